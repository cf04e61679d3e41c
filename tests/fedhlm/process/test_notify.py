"""What a service manager hears: a real datagram socket stands for it, and the parts run as real processes."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_broker.embedded import EmbeddedBroker
from fedhlm.errors import BusError
from fedhlm.process import run as serve
from fedhlm.process.notify import DEFAULT_SPAN_S, Notifier
from tests.brokers import free_port

WATCHDOG_S = 1.0
START_S = 30.0


class Manager:
    """The manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def close(self) -> None:
        self._socket.close()

    def hear(self, timeout_s: float = 5.0) -> dict[str, str] | None:
        """The next message's fields; None when none comes in time."""
        self._socket.settimeout(timeout_s)
        try:
            text = self._socket.recv(65_536).decode()
        except TimeoutError:
            return None
        return dict(line.split("=", 1) for line in text.splitlines())

    def hear_until(self, wanted: Callable[[dict[str, str]], bool]) -> list[dict[str, str]]:
        """All messages up to the wanted one."""
        heard: list[dict[str, str]] = []
        while not heard or not wanted(heard[-1]):
            message = self.hear(START_S)
            assert message is not None, f"nothing more after {heard[-3:]}"
            heard.append(message)
        return heard

    def waiting(self) -> list[dict[str, str]]:
        """What has come already."""
        found = []
        while (message := self.hear(0.001)) is not None:
            found.append(message)
        return found


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@fedhlm-test-{uuid.uuid4().hex}"
    manager = Manager(address)
    yield manager
    manager.close()


def test_without_a_manager_nothing_is_sent() -> None:
    notifier = Notifier.of({})
    assert not notifier.managed
    assert not notifier.send(READY=1)
    asyncio.run(notifier.keep_alive())  # would never end with one


def test_fields_arrive_one_a_line_and_no_value_makes_another_field(manager: Manager) -> None:
    assert Notifier(manager.address).send(STATUS="one\nREADY=1", MAINPID=7)
    assert manager.hear() == {"STATUS": "one READY=1", "MAINPID": "7"}


@pytest.mark.parametrize("address", ["relative", "vsock:2:1", "/nowhere/at/all"])
def test_a_manager_that_cannot_be_reached_is_a_warning(address: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not Notifier(address).send(READY=1)
    assert "cannot be told READY" in caplog.text


@given(microseconds=st.integers(1, 10**12), pid=st.integers(1, 2**22))
def test_the_watchdog_is_ours_only_where_it_names_us(microseconds: int, pid: int) -> None:
    environ = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": str(microseconds)}
    assert Notifier.of(environ, pid).watchdog_s == pytest.approx(microseconds / 1e6)
    assert Notifier.of({**environ, "WATCHDOG_PID": str(pid)}, pid).watchdog_s == pytest.approx(microseconds / 1e6)
    assert Notifier.of({**environ, "WATCHDOG_PID": str(pid + 1)}, pid).watchdog_s == 0.0


@pytest.mark.parametrize("span", ["", "-5", "soon", "1.5", "²"])
def test_a_watchdog_without_a_number_is_none(span: str) -> None:
    assert Notifier.of({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": span}).watchdog_s == 0.0


def test_ready_needs_the_service_and_every_needed_link(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(manager.address)
    calls: list[bool] = []
    home = notifier.link("home", then=calls.append)
    away = notifier.link("away", needed=False)
    home(True)
    assert manager.waiting() == [{"STATUS": "no link to away: trying again"}]
    notifier.serving()
    assert manager.waiting() == [{"READY": "1", "STATUS": "no link to away: trying again"}]
    away(True)
    home(False)
    home(True)
    said = manager.waiting()
    assert [m["STATUS"] for m in said] == ["serving", "no link to home: trying again", "serving"]
    assert not any("READY" in m for m in said)
    assert calls == [True, False, True]
    notifier.stopping()
    home(False)
    assert manager.waiting() == [{"STOPPING": "1", "STATUS": "stopping"}]
    manager.close()


def test_a_link_that_changes_hands_is_never_down(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(manager.address)
    former, successor = notifier.link("broker"), notifier.link("broker")
    notifier.serving()
    former(True)
    successor(True)
    former(False)
    assert [m["STATUS"] for m in manager.waiting()][1:] == ["serving"] * 3
    manager.close()


def test_a_service_that_starts_asks_for_time_until_it_is_ready(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    notifier = Notifier(manager.address)
    notifier.ping()
    assert manager.waiting() == [{"EXTEND_TIMEOUT_USEC": str(int(DEFAULT_SPAN_S * 1e6))}]
    notifier.serving()
    notifier.ping()
    assert manager.waiting() == [{"READY": "1", "STATUS": "serving"}]
    notifier.watchdog_s = 3.0
    notifier.ping()
    assert manager.waiting() == [{"WATCHDOG": "1"}]
    manager.close()


@pytest.mark.parametrize(("managed", "slept"), [(True, [4.0]), (False, [])])
async def test_a_managed_failure_ends_after_a_random_delay(
    managed: bool, slept: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Dice(random.Random):
        def uniform(self, a: float, b: float) -> float:
            assert (a, b) == (0.0, serve.EXIT_JITTER_S)
            return 4.0

    async def sleep(delay_s: float) -> None:
        delays.append(delay_s)

    async def fail() -> int:
        raise BusError("refused")

    delays: list[float] = []
    monkeypatch.setattr("fedhlm.process.run.asyncio.sleep", sleep)
    with pytest.raises(BusError, match="refused"):
        await serve._unhurried(fail(), Notifier(str(tmp_path / "nobody") if managed else None), Dice())
    assert delays == slept


async def test_a_bug_is_not_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(delay_s: float) -> None:
        raise AssertionError(delay_s)

    async def fail() -> int:
        raise KeyError("a bug")

    monkeypatch.setattr("fedhlm.process.run.asyncio.sleep", sleep)
    with pytest.raises(KeyError):
        await serve._unhurried(fail(), Notifier("/nobody"), random.Random(1))


# Real processes


@contextlib.contextmanager
def part(manager: Manager, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    env = {
        **os.environ,
        "NOTIFY_SOCKET": manager.address,
        "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
        "FEDHLM_TELEMETRY__LOG_LEVEL": "ERROR",
    }
    with subprocess.Popen([sys.executable, "-m", "fedhlm_fleet.cli", *arguments], env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def is_ready(message: dict[str, str]) -> bool:
    return "READY" in message


@pytest.mark.slow
@pytest.mark.parametrize("role", ["agent", "edge", "cloud"])
async def test_a_part_is_ready_after_its_broker_and_alive_until_its_loop_stops(role: str, tmp_path: Path) -> None:
    port = free_port()
    manager = Manager(str(tmp_path / "notify") if role == "edge" else f"@fedhlm-test-{uuid.uuid4().hex}")
    # An edge that is given a URL starts no broker of its own.
    with part(manager, role, "--broker.url", f"mqtt://127.0.0.1:{port}") as process:
        early = await asyncio.to_thread(manager.hear_until, lambda m: "no link" in m.get("STATUS", ""))
        early += await asyncio.to_thread(manager.hear_until, lambda m: "WATCHDOG" in m)
        assert not any(map(is_ready, early)), "ready without a broker"
        assert any("EXTEND_TIMEOUT_USEC" in m for m in early)
        async with EmbeddedBroker("127.0.0.1", port):
            await asyncio.to_thread(manager.hear_until, is_ready)
            for _ in range(3):
                await asyncio.to_thread(manager.hear_until, lambda m: "WATCHDOG" in m)
            process.send_signal(signal.SIGSTOP)
            manager.waiting()
            assert await asyncio.to_thread(manager.hear, 2.5 * WATCHDOG_S) is None, "a stopped process pings"
            process.send_signal(signal.SIGCONT)
            await asyncio.to_thread(manager.hear_until, lambda m: "WATCHDOG" in m)
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(manager.hear_until, lambda m: m == {"STOPPING": "1", "STATUS": "stopping"})
            assert await asyncio.to_thread(process.wait, 20) == 0
    manager.close()


@pytest.mark.slow
def test_a_loop_that_hangs_stops_the_pings_though_its_threads_live(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    program = (
        "import asyncio, time, threading\n"
        "from fedhlm.process.notify import Notifier\n"
        "async def main():\n"
        "    notifier = Notifier.of()\n"
        "    threading.Thread(target=lambda: time.sleep(60), daemon=True).start()\n"
        "    task = asyncio.create_task(notifier.keep_alive())\n"
        "    await asyncio.sleep(0.3)\n"
        "    notifier.send(STATUS='hangs')\n"
        "    time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    env = {**os.environ, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "200000"}
    with subprocess.Popen([sys.executable, "-c", program], env=env) as process:
        heard = manager.hear_until(lambda m: m.get("STATUS") == "hangs")
        assert sum("WATCHDOG" in m for m in heard) >= 2
        assert manager.hear(1.0) is None
        process.kill()
    manager.close()


@pytest.mark.slow
async def test_a_part_that_lost_its_broker_says_so_and_goes_on(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    async with EmbeddedBroker() as broker:
        with part(manager, "agent", "--broker.url", broker.url):
            await asyncio.to_thread(manager.hear_until, is_ready)
            await broker.stop()
            await asyncio.to_thread(manager.hear_until, lambda m: "no link to the broker" in m.get("STATUS", ""))
            await asyncio.to_thread(manager.hear_until, lambda m: "WATCHDOG" in m)
            await broker.start()
            heard = await asyncio.to_thread(manager.hear_until, lambda m: m.get("STATUS") == "serving")
            assert not any(map(is_ready, heard)), "readiness is said once"
    manager.close()
