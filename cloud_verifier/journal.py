"""The entry that the cloud adds to its journal beside the bus traffic: its state at start."""

import msgspec

from fedhlm.protocol.messages import Fingerprint
from fedhlm.settings import Federation


class CloudStart(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a cloud at start (note "state"): its model, its limits, and its federation's settings and sums."""

    root: str
    fingerprint: Fingerprint
    eos_ids: frozenset[int]
    context_max: int
    sessions_max: int
    sessions_bytes: int = 64 * 1024 * 1024
    batch_max: int
    federation: Federation
    members: bytes
