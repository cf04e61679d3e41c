"""State of a part on disk: it is restored at the start and written when it has changed."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

from fedhlm.errors import ConfigError, ProtocolError
from fedhlm.process.state import Store
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

SAVE_S: Final = 30.0

InThread = Callable[..., Awaitable[Any]]
"""Runs a function with its arguments without blocking the event loop, such as `asyncio.to_thread`."""


async def inline(work: Callable[..., Any], *given: object) -> Any:
    """Replace `asyncio.to_thread` where time is virtual or recorded: run the work at once."""
    return work(*given)


class Kept(Protocol):
    """State that outlives its process. `restore` raises ProtocolError for bytes that it cannot use."""

    def snapshot(self) -> bytes: ...

    def restore(self, data: bytes, /) -> None: ...


class Saver:
    """Restores `kept`, by file name, on construction, and then writes what has changed.

    A file that cannot be used is put aside with a warning. A full disk causes a warning only. Without a store the saver
    does nothing. `in_thread` runs the writes.
    """

    def __init__(
        self, store: Store | None, kept: Mapping[str, Kept], *, in_thread: InThread = asyncio.to_thread
    ) -> None:
        self._store = store
        self._kept = kept
        self._in_thread = in_thread
        self._written: dict[str, bytes] = {}
        self._newest: dict[str, bytes] = {}
        self._lock = threading.Lock()
        if store is not None:
            for name, part in kept.items():
                _restore(store, name, part)

    async def keep(self) -> None:
        """Save every SAVE_S seconds until cancelled. Without a store this returns at once."""
        while self._store is not None:
            await asyncio.sleep(SAVE_S)
            await self.save()

    async def save(self) -> None:
        """Write what has changed."""
        for name, data in self._changed():
            await self._in_thread(self._write, name, data)

    def flush(self) -> None:
        """Write what has changed and wait for the disk. A part calls this last."""
        for name, data in self._changed():
            self._write(name, data)

    def _changed(self) -> list[tuple[str, bytes]]:
        made = [(name, part.snapshot()) for name, part in self._kept.items()] if self._store is not None else []
        self._newest.update(made)
        return [(name, data) for name, data in made if self._written.get(name) != data]

    def _write(self, name: str, data: bytes) -> None:
        # A write that a cancelled task left in its thread must not overwrite, or mix with, the last write.
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
