"""What an edge writes in its journal beside the bus's traffic: how it began."""

import msgspec

from fedhlm.settings import Federation


class EdgeStart(msgspec.Struct, frozen=True, kw_only=True):
    """How an edge began (note "state"): its settings, and the snapshots of its sums and of its verified tokens."""

    cluster: str
    down_root: str
    up_root: str
    batch_max: int
    memory_max: int
    bridges: bool
    federation: Federation
    members: bytes
    memory: bytes
