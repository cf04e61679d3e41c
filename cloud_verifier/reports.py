"""Which agents are told that the cloud is at work on the contexts that they sent, and until when these may take. No I/O.

An agent that waits while the cloud reads a long context, for the first time or because its cache is gone, cannot tell a slow cloud from a dead one. It is therefore
told once a second, and its block is kept for its patience from then on. A cloud whose model stands still tells nobody
anything.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Final, NamedTuple

from cloud_verifier.calls import BlockJob
from cloud_verifier.queues import Waiting
from cloud_verifier.sessions import Sessions

TELL_S: Final = 1.0  # seconds after which a block is first told of, and between two reports
STILL_S: Final = 30.0  # seconds after which a call of the model that has not ended counts as standing still
TOLD_OF_ONE: Final = 4  # blocks of an agent
PATIENCE_MAX_S: Final = 60.0  # seconds for which a block is kept, with or without reports


class WorkReport(NamedTuple):
    """A block that takes long, and how many tokens of its context have been fed to the model."""

    job: BlockJob
    fed: int


def patience_s(job: BlockJob) -> float:
    """For how many seconds a block is kept after it came, or after a report."""
    return min(job.escalation.patience_ms / 1000.0, PATIENCE_MAX_S)


class WorkReports:
    """The reports on all blocks. `called_s` is when the last call of the model began, in seconds.

    A block without a prime counts if more than `short_max` ids before it must be read again.
    """

    def __init__(self, queue: Waiting, sessions: Sessions, *, short_max: int) -> None:
        self.called_s = -math.inf
        self._queue = queue
        self._sessions = sessions
        self._short_max = short_max

    def due(self, now_s: float) -> list[WorkReport]:
        """What agents are to be told now. Ask every TELL_S seconds while there is work."""
        return [] if now_s - self.called_s > STILL_S else list(self._reports(now_s))

    def _reports(self, now_s: float) -> Iterator[WorkReport]:
        def renewed(job: BlockJob) -> BlockJob | None:
            # A client on the cloud's own machine waits for as long as it takes, and is told nothing.
            early, waits_on = now_s - job.came_s < TELL_S, job.expires_s == math.inf
            if early or waits_on or now_s > job.expires_s or not self._reads(job):
                return None
            until_s = min(now_s + patience_s(job), job.came_s + PATIENCE_MAX_S)
            return job._replace(expires_s=max(job.expires_s, until_s))

        for cluster in self._queue.clusters.values():
            for agent in cluster.agents.values():
                for job, cached in islice(agent.renew(renewed), TOLD_OF_ONE):
                    yield WorkReport(job, min(cached, job.escalation.base))

    def _reads(self, job: BlockJob) -> bool:
        """Whether the model reads a long context for a block, or will."""
        if job.escalation.prime is not None:
            return True
        entry = self._sessions.peek(job.key)
        return entry is not None and job.escalation.base - entry.cached > self._short_max
