"""What the cloud knows of the federation, without I/O: the clusters' sums, and which agents belong together."""

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
    """What the coordinator needs of `clustering.Clusterer`."""

    def note_profile(self, agent: str, cluster: str, sample: Sample) -> None: ...

    def due(self, now_s: float) -> bool: ...

    def compute(self, now_s: float) -> Mapping[str, str]: ...


class _Noted(NamedTuple):
    cluster: str
    sample: Sample


class Coordinator:
    """The clusters' contributions and the agents' profiles. Without a `grouping` profiles are not kept."""

    def __init__(self, members: Members, grouping: Grouping | None = None) -> None:
        self.members = members
        self.grouping = grouping
        self._noted: dict[str, _Noted] = {}

    @classmethod
    def of(cls, federation: Federation) -> "Coordinator":
        """As configured; agents are grouped every `assign_s` seconds, or never."""
        grouping = Clusterer((), columns=COLUMNS, interval_s=federation.assign_s) if federation.assign_s else None
        return cls(Members(federation, mean_of_clusters), grouping)

    def note_profile(self, cluster: str, profile: Profile) -> None:
        """Remember an agent's latest profile until the next `regroup`.

        Raises:
            ProtocolError: keys of another length than DIMS, or as many uncertainties as keys are not there.
        """
        if self.grouping is None:
            return
        sample = sample_of(profile)
        self._noted.pop(profile.agent, None)
        self._noted[profile.agent] = _Noted(cluster, sample)
        if len(self._noted) > PROFILES_MAX:
            del self._noted[next(iter(self._noted))]

    def prepare(self, now_s: float) -> bool:
        """Hand the profiles over; whether `regroup` is worth calling. Not while it runs."""
        if self.grouping is None:
            return False
        noted, self._noted = self._noted, {}
        for agent, (cluster, sample) in noted.items():
            self.grouping.note_profile(agent, cluster, sample)
        return self.grouping.due(now_s)

    def regroup(self, now_s: float) -> Mapping[str, str]:
        """Agents that move, and where to. Takes seconds; profiles may be noted meanwhile from another thread."""
        return {} if self.grouping is None else self.grouping.compute(now_s)


def sample_of(profile: Profile) -> Sample:
    """The features of a profile's last TOKENS_MAX tokens: (n, COLUMNS) float32, the key within -1..1 and the uncertainty.

    Raises:
        ProtocolError: keys of another length than DIMS, or as many uncertainties as keys are not there.
    """
    if profile.dims != DIMS or len(profile.keys) != DIMS * len(profile.uncertainties):
        raise ProtocolError(
            f"profile.keys must be {DIMS} bytes for each of {len(profile.uncertainties)} uncertainties "
            f"(got {len(profile.keys)} bytes of {profile.dims} dims)"
        )
    # Only as many as will be used are kept: agents are many, and a message may hold sixteen times that.
    keys = np.frombuffer(profile.keys, np.int8).reshape(-1, DIMS)[-TOKENS_MAX:].astype(np.float32) / SCALE  # (n, DIMS)
    doubts = np.frombuffer(profile.uncertainties, np.uint8)[-TOKENS_MAX:]  # (n,)
    uncertainty = doubts.astype(np.float32) / _UNCERTAINTY_SCALE  # (n,)
    return Sample(np.column_stack([keys, uncertainty]).astype(np.float32))  # (n, COLUMNS) float32
