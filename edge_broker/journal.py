"""The entry that an edge adds to its journal beside the bus traffic: its state at start."""

import msgspec

from fedhlm.settings import Federation


class EdgeStart(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an edge at start (note "state"): its settings, its sums and its verified tokens."""

    cluster: str
    down_root: str
    up_root: str
    batch_max: int
    memory_max: int
    bridges: bool
    federation: Federation
    members: bytes
    memory: bytes
