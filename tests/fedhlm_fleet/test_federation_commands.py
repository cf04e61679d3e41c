"""`fedhlm federation` and `pki revoke` on a broker: lists, orders, unknown names, absent parts and a dead broker."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Forget, MemberSums, Roster
from fedhlm.telemetry import Counters
from fedhlm_fleet.cli import main
from tests.brokers import free_port

LIMIT_S = 60.0
PORCH = MemberSums("porch", 1, 900.0, 1_200.0, 31.5, 7_300.0, {"cut": 2, "time": 1})
HOME = MemberSums("home", 1, 900.0, 1_200.0, 31.5, 4.0)


class Parts:
    """The edge of `home` and the cloud, played by hand; `obeying` ones note an order in their lists."""

    def __init__(self, bus: MqttBus, obeying: tuple[str, ...]) -> None:
        self.party = Party(bus=bus, stamp=Stamp("parts"), counters=Counters())
        self.obeying = obeying
        self.orders: list[str] = []

    async def tell(self, *obeyed: int) -> None:
        for part, member in (("edge", PORCH), ("cloud", HOME)):
            known = obeyed if part in self.obeying else ()
            roster = Roster(**self.party.stamp(), members=() if known else (member,), left_out=0, obeyed=known)
            if part == "edge":
                await self.party.send(topics.ROSTER, roster, cluster="home")
            else:
                await self.party.send(topics.CLOUD_ROSTER, roster)

    async def serve(self) -> None:
        async for received in self.party.received():
            if isinstance(received.message, Forget):
                self.orders.append(received.levels["member"])
                await self.tell(received.message.order)


@asynccontextmanager
async def fleet(*obeying: str) -> AsyncIterator[tuple[str, Parts]]:
    async with EmbeddedBroker() as broker, MqttBus(broker.url, client_id="parts") as bus:
        await bus.subscribe(topics.FORGET.name(member="+"))
        parts = Parts(bus, obeying)
        await parts.tell()
        serving = asyncio.create_task(parts.serve())
        yield broker.url, parts
        serving.cancel()
        await asyncio.wait([serving])


async def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fedhlm_fleet.cli", *words]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


async def test_the_list_shows_what_each_member_counts_for_and_its_refusals() -> None:
    async with fleet() as (url, _):
        done = await run("federation", "list", "--broker", url)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert ["home", "porch", "1", "1,200", "900", "31.5", "2", "h", "2", "time", "1"] in lines
        assert ["-", "edge-home", "1", "1,200", "900", "31.5", "4", "s", "0"] in lines
        told = json.loads((await run("federation", "list", "--json", "--broker", url)).stdout)
    assert [(row["cluster"], row["name"], row["weight"]) for row in told] == [
        ("", "edge-home", 1_200.0),
        ("home", "porch", 1_200.0),
    ]
    assert (told[1]["cut"], told[1]["refused"]) == (2, {"time": 1})


@pytest.mark.parametrize(
    ("obeying", "code", "says"),
    [
        (("edge", "cloud"), 0, "forgot porch at the cloud and at every edge"),
        (("cloud",), 1, "porch will be forgotten by the edge of home as soon as they are back"),
    ],
)
async def test_an_order_is_confirmed_by_those_who_obeyed(
    obeying: tuple[str, ...], code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedhlm_fleet.federation.OBEYED_S", 5.0)
    async with fleet(*obeying) as (url, parts):
        assert await asyncio.to_thread(main, ["federation", "forget", "porch", "--broker", url]) == code
        assert parts.orders == ["porch"]
    assert says in capsys.readouterr().out


async def test_an_unknown_member_is_refused_and_nothing_is_sent() -> None:
    async with fleet("edge", "cloud") as (url, parts):
        done = await run("federation", "forget", "porsch", "--broker", url)
        assert parts.orders == []
    assert done.returncode == 2
    assert done.stderr == "fedhlm: NAME must be a member of the federation: edge-home, porch (got 'porsch')\n"


async def test_on_an_empty_broker_the_list_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async with EmbeddedBroker() as broker:
        assert await asyncio.to_thread(main, ["federation", "list", "--broker", broker.url]) == 1
    assert capsys.readouterr().out == "no edge and no cloud has listed its members on this broker\n"


@pytest.mark.parametrize("words", [("list",), ("forget", "porch")])
def test_a_dead_broker_is_one_line(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHLM_BROKER__CONNECT_TIMEOUT_S", "1")
    url = f"mqtt://127.0.0.1:{free_port()}"
    assert main(["federation", *words, "--broker", url]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert f"broker {url}" in captured.err


async def test_revoking_an_agent_has_it_forgotten_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["init"],
        ["issue", "porch", "--role", "agent", "--cluster", "home"],
        ["issue", "shed", "--role", "agent", "--cluster", "home"],
        ["issue", "desk", "--role", "client"],
    ):
        assert main(["pki", *words]) == 0
    capsys.readouterr()
    assert main(["pki", "revoke", "shed"]) == 0
    assert "next: fedhlm federation forget shed --broker URL" in capsys.readouterr().out
    async with fleet("edge", "cloud") as (url, parts):
        assert await asyncio.to_thread(main, ["pki", "revoke", "porch", "--broker", url]) == 0
        assert await asyncio.to_thread(main, ["pki", "revoke", "desk", "--broker", url]) == 0
        assert parts.orders == ["porch"], "a client is no member"
    assert "forgot porch at the cloud and at every edge" in capsys.readouterr().out
    monkeypatch.setenv("FEDHLM_BROKER__CONNECT_TIMEOUT_S", "1")
    assert await asyncio.to_thread(main, ["pki", "revoke", "porch", "--broker", url]) == 2
    captured = capsys.readouterr()
    assert "nothing changed, porch has no certificate left to revoke" in captured.out
    assert captured.err.count("\n") == 1
