"""The small accounts of a learner: texts on their way into a certificate, the slack, the state of the published rule."""

from dataclasses import dataclass
from typing import Final

import msgspec

from fedhlm.protocol.fields import Unit
from fedhlm.protocol.messages import PaperThreshold

SLACK_MEMORY: Final = 0.95  # weight of the counts after one more generation
SLACK_EVIDENCE: Final = 10.0  # least number of skipped tokens
SLACK_RISE: Final = 1.03  # largest rise per generation


@dataclass(eq=False)
class OpenText:
    """A finished text that is about to enter a certificate. A certificate takes texts in their order.

    `scored` holds the harm of skipped tokens that verdicts scored. `tail` more tokens wait for the audit, which happens
    with `probability`; their harms become `audited`. `over` is true from the start if the coin decided against an
    audit.
    """

    measure: str
    tokens: int
    scored: list[float]
    tail: int
    probability: float
    audited: list[float] | None = None
    over: bool = False


class Slack:
    """The slack: how many tokens are below tau for each one that is really skipped.

    The others travel in a block that goes up anyway, so they are verified at no cost. The factor rises slowly, because
    a higher tau leaves less to verify, and falls at once.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._eligible = 0.0
        self._skipped = 0.0

    def update(self, *, eligible: int, skipped: int) -> None:
        """Add the counts of one generation."""
        self._eligible = SLACK_MEMORY * self._eligible + eligible
        self._skipped = SLACK_MEMORY * self._skipped + skipped
        if self._skipped >= SLACK_EVIDENCE:
            self.factor = max(1.0, min(self._eligible / self._skipped, SLACK_RISE * self.factor))


class PaperState(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The state of the published rule (`paper-fl`) for one pair of models.

    `threshold` is None before the first round, and `published` before the cluster has published one.
    """

    threshold: Unit | None = None
    published: Unit | None = None
    control: float = 0.0
    server_control: float = 0.0

    def hear(self, told: PaperThreshold) -> None:
        """Adopt the cluster's threshold."""
        self.threshold = self.published = told.threshold
        self.server_control = told.control
