"""The environment in which a part runs: a process, the simulator, or the replay of its journal."""

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
from fedhlm.spans import PASSING, Tracer
from fedhlm.telemetry import Counters


def loop_s() -> float:
    """The time of the running event loop's monotonic clock, in seconds."""
    return asyncio.get_running_loop().time()


class OpenBus(Protocol):
    """Makes a connection to one broker, which the caller enters. `birth` and `will` are its presence messages."""

    def __call__(
        self,
        *,
        client_id: str,
        birth: Retained | None = None,
        will: Retained | None = None,
        on_link: LinkHook | None = None,
    ) -> Bus: ...


class Runtime(NamedTuple):
    """Clocks, threads, disk, journal, counters and tracer of one part.

    `wall_s` returns Unix time and `clock_s` monotonic time, both in seconds. The defaults are those of a process.
    Without a `store` nothing is kept on disk, and without a `journal` none is published.
    """

    counters: Counters
    wall_s: Callable[[], float] = time.time
    clock_s: Callable[[], float] = loop_s
    in_thread: InThread = asyncio.to_thread
    store: Store | None = None
    journal: JournalWriter | None = None
    tracer: Tracer = PASSING

    @classmethod
    def of_process(
        cls, counters: Counters, *, store: Store | None, journal: bool, tracer: Tracer = PASSING
    ) -> "Runtime":
        """Make the runtime of a process. With `journal`, the life of the part gets a random 63-bit number."""
        writer = JournalWriter(random.SystemRandom().getrandbits(63), loop_s) if journal else None
        return cls(counters, store=store, journal=writer, tracer=tracer)

    def stamp(self, sender: str) -> Stamp:
        """Make the stamp for the headers of `sender`'s messages."""
        return Stamp(sender, self.wall_s)

    def party(self, bus: Bus, stamp: Stamp, root: str = DEFAULT_ROOT) -> Party:
        """Make the endpoint of the part on a bus."""
        return Party(bus=bus, stamp=stamp, counters=self.counters, root=root, journal=self.journal, tracer=self.tracer)

    def saver(self, kept: Mapping[str, Kept]) -> Saver:
        """Make a saver, which restores `kept`, by file name, from the store and then saves its changes."""
        return Saver(self.store, kept, in_thread=self.in_thread)
