"""What a part is given by whoever runs it: a process, the simulator, or a check of its journal."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from fedhlm.bus.interface import Bus, LinkHook, Retained
from fedhlm.bus.journal import JournalWriter
from fedhlm.bus.party import Party, Stamp
from fedhlm.process.saver import InThread, Kept, Saver
from fedhlm.process.state import Store
from fedhlm.protocol.topics import DEFAULT_ROOT
from fedhlm.telemetry import Counters


def loop_s() -> float:
    """Seconds on the running event loop's clock, which is monotonic."""
    return asyncio.get_running_loop().time()


class OpenBus(Protocol):
    """Makes a connection to one broker; the caller enters it. The broker publishes `birth` and `will` for it."""

    def __call__(
        self,
        *,
        client_id: str,
        birth: Retained | None = None,
        will: Retained | None = None,
        on_link: LinkHook | None = None,
    ) -> Bus: ...


class Runtime(NamedTuple):
    """Clocks, threads, disk, journal and counters of one part. `wall_s` is Unix time, `clock_s` monotonic, both in seconds.

    The defaults are those of a process. Without a `store` nothing outlasts the part, without a `journal` none is published.
    """

    counters: Counters
    wall_s: Callable[[], float] = time.time
    clock_s: Callable[[], float] = loop_s
    in_thread: InThread = asyncio.to_thread
    store: Store | None = None
    journal: JournalWriter | None = None

    @classmethod
    def of_process(cls, counters: Counters, *, store: Store | None, journal: bool) -> "Runtime":
        """That of a process of its own; with `journal` its life has a number that no other has."""
        writer = JournalWriter(random.SystemRandom().getrandbits(63), loop_s) if journal else None
        return cls(counters, store=store, journal=writer)

    def stamp(self, sender: str) -> Stamp:
        """Headers of the messages that `sender` sends from now on."""
        return Stamp(sender, self.wall_s)

    def party(self, bus: Bus, stamp: Stamp, root: str = DEFAULT_ROOT) -> Party:
        """The part's endpoint on a bus."""
        return Party(bus=bus, stamp=stamp, counters=self.counters, root=root, journal=self.journal)

    def saver(self, kept: Mapping[str, Kept]) -> Saver:
        """Restores what the store has of `kept`, by file name, and saves it from then on."""
        return Saver(self.store, kept, in_thread=self.in_thread)
