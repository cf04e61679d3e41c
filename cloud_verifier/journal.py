"""What the cloud writes in its journal beside the bus's traffic: how it began."""

import msgspec

from fedhlm.protocol.messages import Fingerprint
from fedhlm.settings import Federation


class CloudStart(msgspec.Struct, frozen=True, kw_only=True):
    """How a cloud began (note "state"): its model, its limits, its federation's settings and sums."""

    root: str
    fingerprint: Fingerprint
    eos_ids: frozenset[int]
    context_max: int
    sessions_max: int
    batch_max: int
    federation: Federation
    members: bytes
