"""The timers of a federation: make a round when one is due, keep state on disk; they sleep until there is something to do."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

from fedhlm.bus.interface import Bus
from fedhlm.errors import BusError, ConfigError, ProtocolError
from fedhlm.learning.federation import Members
from fedhlm.process.state import Store
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

SAVE_S: Final = 30.0
NOT_CLOSED_S: Final = 10.0  # between attempts to close a round

InThread = Callable[..., Awaitable[object]]


async def keep_rounds(
    members: Members,
    *,
    bus: Bus,
    changed: asyncio.Event,
    clock_s: Callable[[], float],
    publish: Callable[[], Awaitable[None]],
) -> None:
    """Call `publish`, which closes the round, whenever one is due; `changed` is to be set after each contribution.

    Rounds wait for the bus: a party that starts again hears its own retained state before it writes a new one.
    """
    while True:
        due_s = members.due_s()
        if due_s is not None and clock_s() >= due_s:
            try:
                await bus.wait_connected()
            except BusError:  # closed; whoever reads from it says why
                return
            number = members.round
            await publish()
            if members.round == number:
                # It would be due again at once, and for ever.
                warn_once(log, "not closed", "round %d was published and not closed", number + 1)
                await asyncio.sleep(NOT_CLOSED_S)
            continue
        changed.clear()
        try:
            async with asyncio.timeout(None if due_s is None else due_s - clock_s()):
                await changed.wait()
        except TimeoutError:
            continue


class Kept(Protocol):
    """Something that outlives its process. `restore` raises ProtocolError for bytes that it cannot use."""

    def snapshot(self) -> bytes: ...

    def restore(self, data: bytes, /) -> None: ...


class Saver:
    """Restores on construction, then writes what has changed; a full disk is a warning, not an end.

    What cannot be used is put aside with a warning. Without a store nothing is done.
    """

    def __init__(self, store: Store | None, kept: Mapping[str, Kept]) -> None:
        self._store = store
        self._kept = kept
        self._written: dict[str, bytes] = {}
        self._newest: dict[str, bytes] = {}
        self._lock = threading.Lock()
        if store is not None:
            for name, part in kept.items():
                _restore(store, name, part)

    async def keep(self, in_thread: InThread) -> None:
        """Write every SAVE_S seconds; the disk is waited for in a thread."""
        while self._store is not None:
            await asyncio.sleep(SAVE_S)
            for name, data in self._changed():
                await in_thread(self._write, name, data)

    def write(self) -> None:
        """Write now, waiting for the disk."""
        for name, data in self._changed():
            self._write(name, data)

    def _changed(self) -> list[tuple[str, bytes]]:
        made = [(name, part.snapshot()) for name, part in self._kept.items()] if self._store is not None else []
        self._newest.update(made)
        return [(name, data) for name, data in made if self._written.get(name) != data]

    def _write(self, name: str, data: bytes) -> None:
        # A write that a cancelled task left in its thread must not come after the last one, or between its lines.
        with self._lock:
            if self._store is None or self._newest[name] is not data:
                return
            try:
                self._store.save(name, data)
            except ConfigError as exc:
                warn_once(log, name, "%s", exc)
            else:
                self._written[name] = data


def _restore(store: Store, name: str, part: Kept) -> None:
    data = store.load(name)
    if data is not None:
        try:
            part.restore(data)
        except ProtocolError as exc:
            store.reject(name, f"cannot be used ({exc})")
