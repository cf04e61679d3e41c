"""The cloud's view of the federation, without I/O: the clusters' sums, and the assignment of agents."""

from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

import numpy as np

from cloud_verifier.clustering import PROFILES_MAX, TOKENS_MAX, Clusterer, Sample
from fedhlm.errors import ProtocolError
from fedhlm.learning.federation import Members, mean_of_clusters
from fedhlm.peers.context_keys import DIMS, SCALE
from fedhlm.protocol.messages import Profile
from fedhlm.settings import Federation

COLUMNS: Final = DIMS + 1
_UNCERTAINTY_SCALE: Final = 255.0


class Grouping(Protocol):
    """The methods of `clustering.Clusterer` that the coordinator uses."""

    def note_profile(self, agent: str, cluster: str, sample: Sample) -> None: ...

    def due(self, now_s: float) -> bool: ...

    def compute(self, now_s: float) -> Mapping[str, str]: ...


class _Noted(NamedTuple):
    cluster: str
    sample: Sample


class Coordinator:
    """Holds the clusters' contributions and the agents' profiles. Without a `grouping` it keeps no profiles."""

    def __init__(self, members: Members, grouping: Grouping | None = None) -> None:
        self.members = members
        self.grouping = grouping
        self._noted: dict[str, _Noted] = {}

    @classmethod
    def of(cls, federation: Federation) -> "Coordinator":
        """Create a coordinator from the settings.

        Agents are regrouped every `assign_s` seconds; 0 disables regrouping.
        """
        grouping = Clusterer((), columns=COLUMNS, interval_s=federation.assign_s) if federation.assign_s else None
        return cls(Members(federation, mean_of_clusters, of_clusters=True), grouping)

    def note_profile(self, cluster: str, profile: Profile) -> None:
        """Remember an agent's latest profile until the next `prepare`.

        Raises:
            ProtocolError: the keys do not have DIMS numbers each, or their number differs from that of the doubts.
        """
        if self.grouping is None:
            return
        sample = sample_of(profile)
        self._noted.pop(profile.agent, None)
        self._noted[profile.agent] = _Noted(cluster, sample)
        if len(self._noted) > PROFILES_MAX:
            del self._noted[next(iter(self._noted))]

    def prepare(self, now_s: float) -> bool:
        """Hand the profiles to the grouping, and return whether `regroup` is due.

        Must not be called while `regroup` runs.
        """
        if self.grouping is None:
            return False
        noted, self._noted = self._noted, {}
        for agent, (cluster, sample) in noted.items():
            self.grouping.note_profile(agent, cluster, sample)
        return self.grouping.due(now_s)

    def regroup(self, now_s: float) -> Mapping[str, str]:
        """Regroup the agents, and return those that move: agent -> cluster.

        This takes seconds. Meanwhile another thread may call `note_profile`.
        """
        return {} if self.grouping is None else self.grouping.compute(now_s)


def sample_of(profile: Profile) -> Sample:
    """The features of a profile's last TOKENS_MAX tokens, shape (n, COLUMNS) float32.

    The columns are the key, -1 to 1, and the doubt, 0 to 1.

    Raises:
        ProtocolError: the keys do not have DIMS numbers each, or their number differs from that of the doubts.
    """
    if profile.dims != DIMS or len(profile.keys) != DIMS * len(profile.uncertainties):
        raise ProtocolError(
            f"profile.keys must be {DIMS} bytes for each of {len(profile.uncertainties)} uncertainties "
            f"(got {len(profile.keys)} bytes of {profile.dims} dims)"
        )
    # Only the rows that will be used are kept: there are many agents, and a message may hold sixteen times as many.
    keys = np.frombuffer(profile.keys, np.int8).reshape(-1, DIMS)[-TOKENS_MAX:].astype(np.float32) / SCALE  # (n, DIMS)
    doubts = np.frombuffer(profile.uncertainties, np.uint8)[-TOKENS_MAX:]  # (n,)
    uncertainty = doubts.astype(np.float32) / _UNCERTAINTY_SCALE  # (n,)
    return Sample(np.column_stack([keys, uncertainty]).astype(np.float32))  # (n, COLUMNS) float32
