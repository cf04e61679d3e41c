"""Child processes of a fleet on one machine: started together, watched, and all stopped at the end.

Each part runs as `python -m fedhlm_fleet.cli agent|edge|cloud` in a session of its own. So Ctrl-C reaches only the
parent, which stops the children in order. When the parent is killed, the children end too (`fedhlm.process.leash`).
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fedhlm.errors import FedhlmError
from fedhlm.process.leash import leashed

STOP_S: Final = 5.0  # between SIGTERM and SIGKILL
_TAIL_LINES: Final = 8


class PartFailed(FedhlmError):
    """A part ended unexpectedly; the message contains the end of its log."""


class Processes:
    """A context manager for child processes, which have names; leaving it stops them all."""

    def __init__(self) -> None:
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="fedhlm-")
        self.logs = Path(self._folder.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Shielded: a second Ctrl-C must not leave children behind.
        await asyncio.shield(self.stop())

    async def start(self, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """Start one child; `arguments` follow `python -m`, and `env` is added to the parent's environment."""
        with (self.logs / f"{name}.log").open("wb") as log:
            self._children[name] = await asyncio.create_subprocess_exec(
                *leashed(sys.executable, "-m", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def log_of(self, name: str) -> str:
        """Return everything that a child has printed."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def check(self) -> None:
        """Check that every child is running.

        Raises:
            PartFailed: a child has ended.
        """
        for name, child in self._children.items():
            if child.returncode is not None:
                tail = "\n".join(self.log_of(name).splitlines()[-_TAIL_LINES:])
                raise PartFailed(f"{name} ended with status {child.returncode}: {tail or 'it printed nothing'}")

    async def watch(self) -> None:
        """Run until a child ends, then raise PartFailed."""
        waits = [asyncio.create_task(c.wait(), name=f"watch-{n}") for n, c in self._children.items()]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self.check()

    async def end(self, *names: str) -> None:
        """Stop these children, newest first, and kill those that do not end in time; return when all have ended."""
        children = [self._children.pop(name) for name in reversed(self._children.copy()) if name in names]
        for child in children:
            if child.returncode is None:
                child.terminate()
        for child in children:
            try:
                async with asyncio.timeout(STOP_S):
                    await child.wait()
            except TimeoutError:
                child.kill()
                await child.wait()

    async def stop(self) -> None:
        """Stop all children, and delete their logs."""
        await self.end(*self._children)
        self._folder.cleanup()
