"""Chaos in its short form: real processes over mosquitto, each killed once, links broken; then the same with a liar in it."""

import asyncio
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output
from fedhlm.telemetry import Counters
from fedhlm_fleet.chaos.observer import until
from fedhlm_fleet.chaos.parts import MOSQUITTO
from fedhlm_fleet.chaos.run import Chaos, Options
from fedhlm_fleet.chaos.schedule import ROLES
from tests.processes import obey_interrupts

pytestmark = pytest.mark.slow

KILLS = len(ROLES)
LINKS = 2  # faults of links after the kills
LIMIT_S = 60.0
SEED = 176  # of whose faults each is a second or less: kills in another order, then a cut and a stall


@pytest.fixture(autouse=True)
def needs_mosquitto() -> None:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")


async def test_no_fault_changes_a_token_and_the_fleet_recovers() -> None:
    said: list[str] = []
    options = Options(seconds=LIMIT_S, faults=KILLS + LINKS, seed=SEED, clusters=1, agents=2, tokens=24, short=True)
    report = await Chaos(options, say=said.append).run()
    assert report.violations == [], "\n".join([*said, *report.lines()])
    assert sum(f.faults for f in report.faults.values()) == KILLS + LINKS, said
    assert set(report.faults) >= {f"kill {role}" for role in ROLES}
    assert report.answered > KILLS + LINKS
    assert report.judged["cloud"] > 24 * KILLS
    assert report.unjudged == 0


async def test_a_forged_output_is_found() -> None:
    async def forge(chaos: Chaos) -> None:
        """Say at the agent's place what it did not say, in the middle of an answer."""
        place = chaos.places[0]
        await until(lambda: chaos.observer.writing({place.agent}), LIMIT_S, "an answer under way")
        story = next(s for s in chaos.observer.stories.values() if s.open and s.tokens)
        bus = MqttBus(chaos.broker.url, client_id="forger", connect_timeout_s=10.0)
        async with bus:
            party = Party(bus=bus, stamp=Stamp(place.agent), counters=Counters(), root=topics.DEFAULT_ROOT)
            wrong = (story.tokens[0].token + 1) % 4_096
            lie = Output(
                **party.stamp(), request=story.request, position=0, ids=(wrong,), sources=("cloud",), text="a lie"
            )
            await party.send(topics.OUTPUT, lie, cluster=place.cluster, agent=place.agent, client="chaos")
        await until(lambda: bool(story.violations), LIMIT_S, "the lie noticed")

    options = Options(seconds=LIMIT_S, faults=1, seed=SEED, clusters=1, agents=1, tokens=24, short=True)
    report = await Chaos(options, say=lambda _: None, sabotage=forge).run()
    assert not report.passed
    assert {v.rule for v in report.violations} == {"changed"}


async def test_a_part_that_ends_by_itself_is_found() -> None:
    async def stop_the_edge(chaos: Chaos) -> None:
        # After the kill that is meant for it, which comes first: a second signal at once would hide how it ended.
        await until(lambda: bool(chaos.recoveries), LIMIT_S, "the first fault over")
        chaos.parts.lives["edge-cluster-1"][-1].process.terminate()

    options = Options(seconds=LIMIT_S, faults=KILLS, seed=SEED, clusters=1, agents=1, tokens=24, short=True)
    report = await Chaos(options, say=lambda _: None, sabotage=stop_the_edge).run()
    assert "exited" in {v.rule for v in report.violations}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_leaves_no_process_behind(number: signal.Signals) -> None:
    mark = uuid.uuid4().hex
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedhlm_fleet.chaos", "--clusters", "1", "--minutes", "1"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "CHAOS_TEST_MARK": mark},
        preexec_fn=obey_interrupts,
    )
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        assert b"ready" in await process.stdout.readline()
        assert len(marked(mark)) == 5  # it, the broker, an edge, the cloud, an agent
        process.send_signal(number)
        _, errors = await process.communicate()
    assert process.returncode == 130, errors.decode()
    assert errors.decode() == "interrupted\n"
    assert marked(mark) == []


def marked(mark: str) -> list[int]:
    """Processes with this mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes()
            except OSError:  # gone meanwhile, or another user's
                continue
            if mark.encode() in environment:
                found.append(int(folder.name))
    return found
