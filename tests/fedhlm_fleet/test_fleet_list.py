"""`fedhlm fleet list` as a user and a script run it, against a real broker with a fleet's retained messages."""

import asyncio
import json
import subprocess
import sys
from typing import Any

from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Stamp, presence
from fedhlm.learning.certificate import Certificate
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Evidence, Fingerprint, Learned, MetricsReport, PaperThreshold
from tests.brokers import free_port

SMALL = Fingerprint("abc", 4_096, "philox-1", "small")
LARGE = Fingerprint("abc", 4_096, "philox-1", "large")
PAIR = "3fa4b1.09c2de"


def ran(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fedhlm_fleet.cli", "fleet", "list", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def retained() -> dict[str, bytes]:
    """What a cloud, an edge of `home`, and its agent porch leave on the broker; shed has gone."""
    known = Certificate()
    known.add(20_000, [1.0] * 100)
    learned = Learned(
        **Stamp("edge-home")(),
        round=4,
        members=1,
        thresholds={PAIR: PaperThreshold(0.625, 10)},
        evidence=Evidence(1, {PAIR: known.to_bytes()}),
    )
    cloud = presence(Stamp("cloud"), "cloud", online=True, fingerprint=LARGE)
    edge = presence(Stamp("edge-home"), "edge", online=True, fingerprint=SMALL, upstream=LARGE)
    found = {topics.CLOUD_STATUS.name(): cloud, topics.EDGE_STATUS.name(cluster="home"): edge}
    for agent, online in (("porch", True), ("shed", False)):
        state = presence(Stamp(agent), "agent", online=online, fingerprint=SMALL if online else None)
        found[topics.AGENT_STATUS.name(cluster="home", agent=agent)] = state
    states: dict[str, Any] = {**found, topics.FL_STATE.name(cluster="home"): learned}
    return {name: encode(message) for name, message in states.items()}


async def test_a_fleet_is_listed_as_a_table_and_as_json() -> None:
    url = f"mqtt://127.0.0.1:{(port := free_port())}"
    async with EmbeddedBroker(host="127.0.0.1", port=port):
        nobody = await asyncio.to_thread(ran, "--broker", url, "--wait", "0.3")
        assert (nobody.returncode, nobody.stdout, nobody.stderr) == (
            1,
            "no part has announced itself on this broker\n",
            "",
        )
        async with MqttBus(url, client_id="fleet", birth=None) as bus:
            for name, payload in retained().items():
                await bus.publish(name, payload, qos=1, retain=True)
            told = asyncio.create_task(asyncio.to_thread(ran, "--broker", url, "--wait", "6", "--json"))
            report = encode(MetricsReport(**Stamp("porch")(), values={"tau": 0.5, "risk_limit": 0.021}))
            while not told.done():
                await bus.publish(topics.AGENT_METRICS.name(cluster="home", agent="porch"), report, qos=1)
                await asyncio.sleep(0.2)
        done = await told
        table = await asyncio.to_thread(ran, "--broker", url)
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert found["missing"] == []
    cloud, home = found["clusters"]
    assert (cloud["cluster"], [part["name"] for part in cloud["parts"]]) == ("", ["cloud"])
    assert (home["cluster"], home["round"], home["members"], home["threshold"]) == ("home", 4, 1, 0.625)
    assert 0.005 < home["error"] < 0.01
    edge, porch, shed = home["parts"]
    assert (edge["role"], edge["online"]) == ("edge", True)
    assert (porch["name"], porch["model"], porch["online"]) == ("porch", "small", True)
    assert (porch["threshold"], porch["error"]) == (0.5, 0.021)
    assert (shed["name"], shed["online"], shed["threshold"]) == ("shed", False, None)
    assert shed["wrong"]

    lines = table.stdout.splitlines()
    assert lines[1].split()[:5] == ["cluster", "part", "state", "version", "model"]
    (row,) = [line.split() for line in lines if " edge " in line]
    assert row[0] == "home"
    assert row[-2] == "0.625", "an edge shows the threshold of its round"
    assert row[-1].endswith("%")
    assert lines[1].rstrip().endswith("error <=, 95%")
    assert any(line.startswith("home shed: ") for line in lines)
    assert max(map(len, lines)) <= 80
