"""The federation's timer wakes when there is something to do, and only then."""

import asyncio
import random

from fedhlm.learning import rounds
from fedhlm.learning.federation import Members, mean_of_agents
from fedhlm.protocol.messages import SCHEMA_VERSION, Contribution
from fedhlm.settings import Federation
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from fedhlm_lab.sim.virtual import run_virtual


def contribution(number: int) -> Contribution:
    return Contribution(version=SCHEMA_VERSION, sender="a", sequence=number, sent_ms=number, round=number, members=1)


class Clock:
    """Counts how often it is asked: a loop that polls would ask for ever."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return asyncio.get_running_loop().time()


def test_rounds_come_by_count_at_once_and_by_time_later_and_nothing_polls() -> None:
    async def scenario() -> tuple[list[float], int]:
        members = Members(Federation(round_updates=2, round_s=5.0), mean_of_agents)
        changed, clock = asyncio.Event(), Clock()
        made: list[float] = []

        async def publish() -> None:
            members.close()
            made.append(asyncio.get_running_loop().time())

        def take(name: str, number: int) -> None:
            members.take(name, contribution(number), asyncio.get_running_loop().time())
            changed.set()

        async with LoopbackBus(LoopbackBroker(random.Random(1)), client_id="e") as bus:
            timer = asyncio.create_task(
                rounds.keep_rounds(members, bus=bus, changed=changed, clock_s=clock, publish=publish)
            )
            await asyncio.sleep(1000.0)
            take("a", 1)
            await asyncio.sleep(100.0)
            take("a", 2)
            await asyncio.sleep(1.0)
            take("b", 1)
            await asyncio.sleep(100.0)
            timer.cancel()
            await asyncio.wait([timer])
        return made, clock.asked

    made, asked = run_virtual(scenario())
    assert made == [1005.0, 1101.0]
    assert asked < 20


def test_a_round_waits_for_the_bus_and_ends_with_it() -> None:
    async def scenario() -> tuple[list[float], bool]:
        members = Members(Federation(round_s=1.0), mean_of_agents)
        broker = LoopbackBroker(random.Random(1))
        broker.stop()
        bus = LoopbackBus(broker, client_id="e")
        made: list[float] = []
        changed, clock_s = asyncio.Event(), asyncio.get_running_loop().time

        async def publish() -> None:
            members.close()
            made.append(clock_s())

        await bus.__aenter__()
        timer = asyncio.create_task(
            rounds.keep_rounds(members, bus=bus, changed=changed, clock_s=clock_s, publish=publish)
        )
        members.touch(0.0)
        changed.set()
        await asyncio.sleep(50.0)
        assert made == []
        broker.start()
        await asyncio.sleep(5.0)
        broker.stop()
        members.touch(clock_s())
        changed.set()
        await asyncio.sleep(5.0)
        assert not timer.done()
        bus.crash()
        done, _ = await asyncio.wait([timer], timeout=1.0)
        return made, bool(done) and timer.exception() is None

    made, ended = run_virtual(scenario())
    assert len(made) == 1
    assert 50.0 <= made[0] <= 52.0
    assert ended


def test_a_round_that_is_not_closed_does_not_stop_the_rest() -> None:
    async def scenario() -> int:
        members = Members(Federation(round_s=1.0), mean_of_agents)
        made = 0

        async def publish() -> None:
            nonlocal made
            made += 1
            if made > 1_000:
                raise AssertionError("published again and again")

        async with LoopbackBus(LoopbackBroker(random.Random(1)), client_id="e") as bus:
            changed, clock_s = asyncio.Event(), asyncio.get_running_loop().time
            timer = asyncio.create_task(
                rounds.keep_rounds(members, bus=bus, changed=changed, clock_s=clock_s, publish=publish)
            )
            members.touch(0.0)
            changed.set()
            await asyncio.sleep(100.0)
            assert not timer.done()
            timer.cancel()
            await asyncio.wait([timer])
        return made

    assert 2 <= run_virtual(scenario()) <= 11
