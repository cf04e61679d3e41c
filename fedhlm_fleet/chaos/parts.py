"""The processes of a chaos run: started, killed, started again, sampled, and all gone at the end.

Each life of a part has a log of its own. A part that ends without being asked to is a violation, as is a log that tells
of an unhandled error.
"""

import asyncio
import getpass
import os
import shutil
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
    """Of all lives of a part: the largest resident set, the largest growth after settling, the longest life."""

    peak_bytes: int
    growth_bytes: int | None
    longest_s: float


@dataclass
class ProcessLife:
    """One process of a part. `samples` are (seconds, resident bytes)."""

    number: int
    process: asyncio.subprocess.Process
    log: Path
    samples: list[tuple[float, int]] = field(default_factory=list)
    killed: bool = False


class Parts:
    """Processes by the name of their part. `limits_of` gives a part's limits of memory; leaving the context kills all.

    The logs go to the folder `logs`, which must be there; without one they are gone with the processes.
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
        # The signals go out before anything is awaited: whoever interrupts us twice leaves no process behind.
        living = [life for lives in self.lives.values() for life in lives if life.process.returncode is None]
        for life in living:
            life.killed = True
            life.process.kill()
        for life in living:
            await life.process.wait()
        self._temporary.cleanup()

    async def start(self, name: str, *command: str, env: Mapping[str, str] | None = None) -> None:
        """Begin the first life of a part; an empty command begins another one with the command of the first."""
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
                start_new_session=True,  # Ctrl-C is for us
            )
        lives.append(ProcessLife(len(lives), process, path))

    async def kill(self, name: str) -> None:
        """kill -9, now; returns when the process is gone."""
        life = self.lives[name][-1]
        self.check(name)
        life.killed = True
        if life.process.returncode is None:
            life.process.kill()
        await life.process.wait()

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a part that is there."""
        self.check(name)
        if self.alive(name):
            self.lives[name][-1].process.send_signal(number)

    async def stop(self) -> None:
        """Ask every part to stop, in the order of their start reversed; one that does not, or says so in its status, is noted."""
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
        """Note a part that ended by itself."""
        life = self.lives[name][-1]
        if life.process.returncode is not None and not life.killed:
            life.killed = True
            tail = "\n    ".join(self.log_of(life).splitlines()[-8:])
            self.violations.append(BrokenInvariant("exited", name, f"status {life.process.returncode}: {tail}"))

    def alive(self, name: str) -> bool:
        """Whether the newest process of a part runs."""
        return self.lives[name][-1].process.returncode is None

    def log_of(self, life: ProcessLife) -> str:
        """All that a process has printed."""
        return life.log.read_text(errors="replace")

    def sample(self) -> None:
        """Look at the memory of every process, and that it is there."""
        for name, lives in self.lives.items():
            self.check(name)
            if (size := resident_bytes(lives[-1].process.pid)) is not None:
                lives[-1].samples.append((self._clock_s(), size))

    def judged(self) -> list[BrokenInvariant]:
        """Everything that is wrong with the processes, their logs and their memory up to now."""
        found = list(self.violations)
        for name, lives in self.lives.items():
            for life in lives:
                who = f"{name} (life {life.number})"
                found += log_violations(who, self.log_of(life))
                found += memory_violations(who, life.samples, self._limits_of(name))
        return found

    def memory(self) -> dict[str, MemoryUse]:
        """What the lives of each part occupied."""
        found = {}
        for name, lives in self.lives.items():
            settle_s = self._limits_of(name).settle_s
            grown = [g for life in lives if (g := growth_bytes(life.samples, settle_s)) is not None]
            spans = [life.samples[-1][0] - life.samples[0][0] for life in lives if life.samples]
            peak = max((size for life in lives for _, size in life.samples), default=0)
            found[name] = MemoryUse(peak, max(grown, default=None), max(spans, default=0.0))
        return found


def resident_bytes(pid: int) -> int | None:
    """The resident set of a process; None when it is gone or the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * _PAGE_BYTES or None  # a zombie has none


class BrokerPart:
    """mosquitto as a part: always the same port, with or without what it has on disk.

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
        """Where it listens itself."""
        return f"mqtt://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Begin its first life."""
        self._disk.mkdir()
        lines = [
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            f"user {getpass.getuser()}",  # root would become another user, who may not write here
            f"persistence {str(self._persistent).lower()}",
            f"persistence_location {self._disk}/",
            # A kill -9 must find on disk what a client was promised: every change is written.
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
        """Begin another life, with an empty disk unless `keep`."""
        if not keep:
            (self._disk / "mosquitto.db").unlink(missing_ok=True)
        await self._parts.start(BROKER)
        await self.listening()

    async def listening(self) -> None:
        """Return once it accepts connections.

        Raises:
            TimeoutError: it does not within LISTENING_S.
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
    """A local port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def module(*arguments: str) -> tuple[str, ...]:
    """The command line of a part of ours."""
    return (sys.executable, "-m", "fedhlm_fleet.cli", *arguments)
