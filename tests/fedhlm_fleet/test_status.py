"""`fedhlm status`: every part that has announced itself, what it reaches, and what is missing."""

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.interface import Retained
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Stamp, presence
from fedhlm.learning.certificate import Certificate
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Evidence, Fingerprint, Learned
from fedhlm_fleet.cli import main
from fedhlm_fleet.commands.status import age
from fedhlm_fleet.status import Heard, missing, rows
from tests.brokers import free_port

SMALL, LARGE = Fingerprint("abc", 4_096, "philox-1", "small"), Fingerprint("abc", 4_096, "philox-1", "large")
OTHER = Fingerprint("xyz", 4_096, "philox-1", "foreign")


def heard(cluster: str, name: str, role: str, **options: Any) -> Heard:
    return Heard(cluster, name, presence(Stamp(name), role, **{"online": True, **options}))


WELL = [
    heard("home", "porch", "agent", fingerprint=SMALL),
    heard("home", "attic", "agent", fingerprint=SMALL),
    heard("", "cloud", "cloud", fingerprint=LARGE),
    heard("home", "edge", "edge", upstream=LARGE),
]


def wrongs(parts: list[Heard]) -> dict[str, str]:
    return {row.name: row.wrong for row in rows(parts) if row.wrong}


def test_a_fleet_that_is_well_lacks_nothing() -> None:
    found = rows(WELL)
    assert [(row.cluster, row.name, row.link) for row in found] == [
        ("", "cloud", ""),
        ("home", "edge", "the cloud"),
        ("home", "attic", "its edge"),
        ("home", "porch", "its edge"),
    ]
    assert [row.model for row in found] == ["large", "", "small", "small"]
    assert wrongs(WELL) == {}
    assert missing(found) == []


def test_what_is_not_there_is_named() -> None:
    assert wrongs([*WELL[:3], heard("home", "edge", "edge")]) == {
        "edge": "sees no cloud: what its cluster does not know stays unverified"
    }
    gone = [*WELL[1:3], heard("home", "edge", "edge", online=False)]
    assert wrongs(gone) == {"edge": "offline", "attic": "its edge is not there: what needs the cloud stays unverified"}
    assert missing(rows(WELL[:1])) == ["no edge has announced itself in cluster home"]
    assert missing([]) == ["no part has announced itself on this broker"]
    assert set(wrongs([*WELL, heard("home", "shed", "agent", fingerprint=OTHER)])) == {"shed"}


@pytest.mark.parametrize(
    ("span_s", "words"), [(0.2, "0 s"), (59, "59 s"), (60, "1 min"), (7_300, "2 h"), (9e5, "10 d")]
)
def test_spans_are_read_at_a_glance(span_s: float, words: str) -> None:
    assert age(span_s) == words


async def announced(url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """What the command prints while these parts are on the broker."""
    buses = [
        MqttBus(
            url,
            client_id=f"{part.cluster}-{part.name}",
            birth=Retained(
                {"cloud": topics.CLOUD_STATUS, "edge": topics.EDGE_STATUS, "agent": topics.AGENT_STATUS}[
                    part.presence.role
                ].name(cluster=part.cluster, agent=part.name),
                encode(part.presence),
            ),
        )
        for part in WELL
    ]
    command = [sys.executable, "-m", "fedhlm_fleet.cli", "status", "--broker", url, *arguments]
    for bus in buses:
        await bus.__aenter__()
    try:
        return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        for bus in buses:
            await bus.__aexit__(None, None, None)


async def test_the_command_shows_what_is_on_a_broker() -> None:
    async with EmbeddedBroker() as broker:
        done = await announced(broker.url)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        # Between name and software stands an age, whose unit depends on how slow the machine is.
        assert ["home", "edge", "online", "fedhlm", "0.1.0", "the", "cloud"] in [line[:3] + line[5:] for line in lines]
        told = json.loads((await announced(broker.url, "--json")).stdout)
        assert [part["name"] for part in told["parts"]] == ["cloud", "edge", "attic", "porch"]
        assert told["missing"] == []


async def test_the_command_tells_the_error_of_the_fleet() -> None:
    known = Certificate()
    known.add(20_000, [1.0] * 100)
    evidence = Evidence(1, {"3fa4b1.09c2de": known.to_bytes()})
    state = Learned(**Stamp("cloud")(), round=1, members=8, evidence=evidence)
    async with EmbeddedBroker() as broker:
        bus = MqttBus(broker.url, client_id="teller", birth=Retained(topics.CLOUD_FL_STATE.name(), encode(state)))
        async with bus:
            shown = (await announced(broker.url)).stdout
            told = json.loads((await announced(broker.url, "--json")).stdout)
    assert f"error of the fleet at most {known.limit(0.95):.4f} at 95% (20,000 tokens in " in shown
    assert told["errors"][0]["limit"] == pytest.approx(known.limit(0.95))
    assert told["errors"][0]["pair"] == "3fa4b1.09c2de"


async def test_on_an_empty_broker_the_status_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    async with EmbeddedBroker() as broker:
        assert await asyncio.to_thread(main, ["status", "--broker", broker.url]) == 1
    assert capsys.readouterr().out == "no part has announced itself on this broker\n"


def test_without_a_broker_it_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHLM_BROKER__CONNECT_TIMEOUT_S", "1")
    assert main(["status", "--broker", f"mqtt://127.0.0.1:{free_port()}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
