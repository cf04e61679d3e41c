"""The processes of a chaos run: they are started, killed, restarted and sampled, and all are stopped at the end.

Each life of a part is one process with its own log. A part that ends unexpectedly is a violation, and so is an
unhandled error in a log.
"""

import asyncio
import getpass
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from fedhlm.errors import FedhlmError
from fedhlm.process.leash import leashed
from fedhlm_fleet.chaos.invariants import BrokenInvariant, GrowthLimits, growth_bytes, log_violations, memory_violations

MOSQUITTO: Final = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
BROKER: Final = "broker"
LISTENING_S: Final = 10.0
STOP_S: Final = 10.0
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class MemoryUse(NamedTuple):
    """The memory of all lives of a part: the largest resident set, the largest growth, and the longest life."""

    peak_bytes: int
    growth_bytes: int | None
    longest_s: float


@dataclass
class ProcessLife:
    """One process of a part. `samples` are pairs of seconds and resident bytes."""

    number: int
    process: asyncio.subprocess.Process
    log: Path
    samples: list[tuple[float, int]] = field(default_factory=list)
    killed: bool = False


class Parts:
    """A context manager for processes, by the name of their part; leaving it kills them all.

    `limits_of` returns a part's memory limits. The logs are written to the existing folder `logs`; without it, they are
    deleted at the end.
    """

    def __init__(
        self, clock_s: Callable[[], float], limits_of: Callable[[str], GrowthLimits], *, logs: Path | None = None
    ) -> None:
        self.lives: dict[str, list[ProcessLife]] = {}
        self.violations: list[BrokenInvariant] = []
        self._clock_s = clock_s
        self._limits_of = limits_of
        self._commands: dict[str, tuple[tuple[str, ...], Mapping[str, str]]] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="fedhlm-chaos-")
        self.folder = Path(self._temporary.name)
        self._logs = logs or self.folder

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All signals are sent before the first await, so that a second interrupt leaves no process behind.
        living = [life for lives in self.lives.values() for life in lives if life.process.returncode is None]
        for life in living:
            life.killed = True
            life.process.kill()
        for life in living:
            await life.process.wait()
        self._temporary.cleanup()

    async def start(self, name: str, *command: str, env: Mapping[str, str] | None = None) -> None:
        """Start a part; an empty command restarts it with its first command."""
        if command:
            self._commands[name] = command, env or {}
        words, added = self._commands[name]
        lives = self.lives.setdefault(name, [])
        path = self._logs / f"{name}.{len(lives)}.log"
        with path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *leashed(*words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **added},
                start_new_session=True,  # Ctrl-C reaches only the parent
            )
        lives.append(ProcessLife(len(lives), process, path))

    async def kill(self, name: str) -> None:
        """Send SIGKILL, and return when the process has ended."""
        life = self.lives[name][-1]
        self.check(name)
        life.killed = True
        if life.process.returncode is None:
            life.process.kill()
            if await life.process.wait() != -signal.SIGKILL:
                self._note_exit(name, life)  # it was already ending by itself
        await life.process.wait()

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a part if it is running."""
        self.check(name)
        if self.alive(name):
            self.lives[name][-1].process.send_signal(number)

    async def stop(self) -> None:
        """Stop every part, the last one first; not stopping, or a status other than 0, is a violation."""
        for name in reversed(self.lives):
            life = self.lives[name][-1]
            self.check(name)
            if life.killed:
                continue
            life.killed = True
            life.process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    status = await life.process.wait()
            except TimeoutError:
                life.process.kill()
                await life.process.wait()
                self.violations.append(BrokenInvariant("stop", name, f"still there {STOP_S:g} s after SIGTERM"))
            else:
                if status != 0:
                    self.violations.append(
                        BrokenInvariant("stop", name, f"status after SIGTERM must be 0 (got {status})")
                    )

    def check(self, name: str) -> None:
        """Record a violation if a part has ended unexpectedly."""
        life = self.lives[name][-1]
        if life.process.returncode is not None and not life.killed:
            life.killed = True
            self._note_exit(name, life)

    def _note_exit(self, name: str, life: ProcessLife) -> None:
        tail = "\n    ".join(self.log_of(life).splitlines()[-8:])
        self.violations.append(BrokenInvariant("exited", name, f"status {life.process.returncode}: {tail}"))

    def alive(self, name: str) -> bool:
        """Return whether the newest process of a part is running."""
        return self.lives[name][-1].process.returncode is None

    def log_of(self, life: ProcessLife) -> str:
        """Return everything that a process has printed."""
        return life.log.read_text(errors="replace")

    def sample(self) -> None:
        """Sample the memory of every process, and check that it is running."""
        for name, lives in self.lives.items():
            self.check(name)
            if (size := resident_bytes(lives[-1].process.pid)) is not None:
                lives[-1].samples.append((self._clock_s(), size))

    def judged(self) -> list[BrokenInvariant]:
        """Return all violations of the processes, their logs and their memory so far."""
        found = list(self.violations)
        for name, lives in self.lives.items():
            for life in lives:
                who = f"{name} (life {life.number})"
                found += log_violations(who, self.log_of(life))
                found += memory_violations(who, life.samples, self._limits_of(name))
        return found

    def memory(self) -> dict[str, MemoryUse]:
        """Return the memory use of each part over all its lives."""
        found = {}
        for name, lives in self.lives.items():
            settle_s = self._limits_of(name).settle_s
            grown = [g for life in lives if (g := growth_bytes(life.samples, settle_s)) is not None]
            spans = [life.samples[-1][0] - life.samples[0][0] for life in lives if life.samples]
            peak = max((size for life in lives for _, size in life.samples), default=0)
            found[name] = MemoryUse(peak, max(grown, default=None), max(spans, default=0.0))
        return found


def resident_bytes(pid: int) -> int | None:
    """Return the resident bytes of a process, or None if it has ended or the system does not report them."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * _PAGE_BYTES or None  # a zombie has none


class BrokerPart:
    """mosquitto as a part, always on the same port; a restart keeps or deletes its state on disk.

    Raises:
        FedhlmError: mosquitto is not installed.
    """

    def __init__(self, parts: Parts, *, persistent: bool) -> None:
        if MOSQUITTO is None:
            raise FedhlmError("mosquitto is not installed: chaos needs a real broker")
        self._parts = parts
        self._disk = parts.folder / "broker"
        self._persistent = persistent
        self._executable = MOSQUITTO
        self.port = free_port()

    @property
    def url(self) -> str:
        """The URL of the broker itself, without a proxy."""
        return f"mqtt://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Configure and start the broker."""
        self._disk.mkdir()
        lines = [
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            f"user {getpass.getuser()}",  # as root, mosquitto would change to a user without write access here
            f"persistence {str(self._persistent).lower()}",
            f"persistence_location {self._disk}/",
            # Every change is written, so that what a client was promised is on disk at a SIGKILL.
            "autosave_on_changes true",
            "autosave_interval 1",
            "log_type error",
            "log_type warning",
        ]
        config = self._disk / "mosquitto.conf"
        config.write_text("\n".join([*lines, ""]))
        await self._parts.start(BROKER, self._executable, "-c", str(config))
        await self.listening()

    async def restart(self, *, keep: bool) -> None:
        """Restart the broker, without its saved state unless `keep`."""
        if not keep:
            (self._disk / "mosquitto.db").unlink(missing_ok=True)
        await self._parts.start(BROKER)
        await self.listening()

    async def listening(self) -> None:
        """Wait until the broker accepts connections.

        Raises:
            TimeoutError: the broker accepts none within LISTENING_S seconds.
        """
        async with asyncio.timeout(LISTENING_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    await writer.wait_closed()
                    return


def free_port() -> int:
    """Return a local port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def module(*arguments: str) -> tuple[str, ...]:
    """Return the command line of `fedhlm` with these arguments."""
    return (sys.executable, "-m", "fedhlm_fleet.cli", *arguments)
