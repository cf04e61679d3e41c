"""Brokers for tests: mosquitto on a free port, a TCP proxy that records and breaks connections, and one face for
the loopback, mosquitto and embedded brokers, so that one test runs on all of them.
"""

import asyncio
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.interface import Bus, Delivery
from fedhlm.bus.mqtt import MqttBus
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from fedhlm_lab.sim.virtual import run_virtual

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
START_TIMEOUT_S = 10.0
TEST_TIMEOUT_S = 60.0


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mosquitto:
    """A mosquitto process on a free port; `start` after `stop` takes the same port again."""

    def __init__(
        self, *, users: dict[str, str] | None = None, extra: str = "", files: dict[str, bytes] | None = None
    ) -> None:
        self.port = free_port()
        self._files = files or {}
        self._users = users
        self._extra = extra
        self._process: asyncio.subprocess.Process | None = None
        self._temporary = tempfile.TemporaryDirectory(prefix="mosquitto-")

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def folder(self) -> Path:
        """Where `files` lie; `{0}` in `extra` stands for it."""
        return Path(self._temporary.name)

    @property
    def log(self) -> str:
        """What the broker has said."""
        return (self.folder / "log").read_text("utf-8", errors="replace")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        self._temporary.cleanup()

    async def start(self) -> None:
        assert MOSQUITTO is not None
        config = self.folder / "mosquitto.conf"
        if not config.exists():
            self.write()
        with (self.folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                MOSQUITTO, "-c", str(config), stdout=asyncio.subprocess.DEVNULL, stderr=log
            )
        async with asyncio.timeout(START_TIMEOUT_S):
            await until_listening(self.port)

    def write(self) -> None:
        """Write the configuration."""
        folder = self.folder
        folder.chmod(0o755)
        lines = [f"listener {self.port} 127.0.0.1", f"allow_anonymous {'false' if self._users else 'true'}"]
        if self._users:
            passwords = folder / "passwords"
            passwords.touch(0o600)
            for name, word in self._users.items():  # -U would read a colon in a password as its end
                subprocess.run(["mosquitto_passwd", "-b", str(passwords), name, word], check=True)
            passwords.chmod(0o644)
            lines.append(f"password_file {passwords}")
        config = folder / "mosquitto.conf"
        for name, content in self._files.items():
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o644)
        config.write_text("\n".join([*lines, self._extra.format(folder), ""]))

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.terminate()
            await process.wait()


async def until_listening(port: int) -> None:
    """Return once somebody accepts connections on a port."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.005)
        else:
            writer.close()
            await writer.wait_closed()
            return


class TcpProxy:
    """Forwards to a port, records what the clients send, and can cut all connections without a goodbye."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.sent = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut()

    async def cut(self) -> None:
        """Break every connection and take no new one."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def mend(self) -> None:
        """Take connections again after a cut, on the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_writer = None
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            async with asyncio.TaskGroup() as both:
                both.create_task(_forward(reader, far_writer, self.sent))
                both.create_task(_forward(far_reader, writer, None))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for end in (writer, far_writer):
                if end is not None:
                    end.transport.abort()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray | None) -> None:
    while data := await reader.read(65_536):
        if record is not None:
            record += data
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError("one side closed")


class Network(Protocol):
    """What a contract test needs: buses, an abnormal loss, and a broker that stops and starts."""

    def bus(self, client_id: str, **options: Any) -> Bus: ...

    async def lose(self, client_id: str) -> None:
        """Cut that client off without a goodbye, for good."""

    async def stop(self) -> None: ...

    async def start(self) -> None: ...


class LoopbackNetwork:
    def __init__(self) -> None:
        self.broker = LoopbackBroker(random.Random(1))
        self._buses: dict[str, LoopbackBus] = {}

    def bus(self, client_id: str, **options: Any) -> Bus:
        self._buses[client_id] = LoopbackBus(self.broker, client_id=client_id, **options)
        return self._buses[client_id]

    async def lose(self, client_id: str) -> None:
        self._buses[client_id].crash()

    async def stop(self) -> None:
        self.broker.stop()

    async def start(self) -> None:
        self.broker.start()


class MqttNetwork:
    """Every client goes through its own proxy, so that it can be cut off."""

    def __init__(self, broker: Mosquitto | EmbeddedBroker, protocol: Literal["auto", "5", "3.1.1"]) -> None:
        self._broker = broker
        self._protocol = protocol
        self._proxies: dict[str, TcpProxy] = {}

    async def prepare(self, *client_ids: str) -> None:
        for client_id in client_ids:
            self._proxies[client_id] = await TcpProxy(self._broker.port).__aenter__()

    def bus(self, client_id: str, **options: Any) -> Bus:
        settings: dict[str, Any] = {"protocol": self._protocol, "backoff_cap_s": 0.2, "rng": random.Random(1)}
        return MqttBus(self._proxies[client_id].url, client_id=client_id, **(settings | options))

    async def lose(self, client_id: str) -> None:
        await self._proxies[client_id].cut()

    async def stop(self) -> None:
        await self._broker.stop()

    async def start(self) -> None:
        await self._broker.start()

    async def close(self) -> None:
        for proxy in self._proxies.values():
            await proxy.cut()


Kind = Literal["loopback", "mosquitto-5", "mosquitto-3.1.1", "embedded-5", "embedded-3.1.1"]
CLIENT_IDS = ("one", "two", "three")


@asynccontextmanager
async def network(kind: Kind) -> AsyncIterator[Network]:
    """A network of one kind; its clients are called as in CLIENT_IDS."""
    if kind == "loopback":
        yield LoopbackNetwork()
        return
    broker = EmbeddedBroker() if kind.startswith("embedded") else Mosquitto()
    async with broker:
        net = MqttNetwork(broker, "5" if kind.endswith("-5") else "3.1.1")
        try:
            await net.prepare(*CLIENT_IDS)
            yield net
        finally:
            await net.close()


def run_on(kind: Kind, scenario: Callable[[Network], Awaitable[None]]) -> None:
    """Run a scenario on a network: the loopback in virtual time, brokers in real time with a limit."""

    async def main() -> None:
        async with asyncio.timeout(TEST_TIMEOUT_S), network(kind) as net:
            await scenario(net)

    if kind == "loopback":
        run_virtual(main())
    else:
        asyncio.run(main())


async def take(bus: Bus, count: int) -> list[Delivery]:
    """The next `count` messages of a bus."""
    taken: list[Delivery] = []
    deliveries = bus.deliveries()
    while len(taken) < count:
        taken.append(await anext(deliveries))
    return taken


async def until(condition: Callable[[], bool]) -> None:
    """Return once a condition holds, looking again every few milliseconds; the caller sets the limit."""
    while not condition():  # noqa: ASYNC110 - a count has no event to wait for
        await asyncio.sleep(0.005)
