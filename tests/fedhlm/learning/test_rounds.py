"""The federation's timers wake when there is something to do, and only then; state is written when it has changed."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from fedhlm.errors import ConfigError, ProtocolError
from fedhlm.learning import rounds
from fedhlm.learning.federation import Members, mean_of_agents
from fedhlm.process.state import Store
from fedhlm.protocol.messages import SCHEMA_VERSION, Contribution
from fedhlm.settings import Federation
from fedhlm_lab.sim.loopback import LoopbackBroker, LoopbackBus
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


class Part:
    def __init__(self) -> None:
        self.value = b"new"

    def snapshot(self) -> bytes:
        return self.value

    def restore(self, data: bytes, /) -> None:
        if data == b"bad":
            raise ProtocolError("of another age")
        self.value = data


class Shelf:
    """A store in memory that counts; `full` refuses to write."""

    def __init__(self, **files: bytes) -> None:
        self.files = files
        self.saved: list[str] = []
        self.rejected: list[str] = []
        self.full = False

    def save(self, name: str, data: bytes) -> None:
        if self.full:
            raise ConfigError("edge.state", "there", "full")
        self.saved.append(name)
        self.files[name] = data

    @property
    def store(self) -> Store:
        return Store(self.files.get, self.save, lambda name, _why: self.rejected.append(name))


async def inline(work: Callable[..., Any], *given: object) -> Any:
    return work(*given)


def test_what_was_saved_is_restored_and_what_is_not_understood_is_put_aside() -> None:
    shelf, a, b = Shelf(a=b"kept", b=b"bad"), Part(), Part()
    rounds.Saver(shelf.store, {"a": a, "b": b})
    assert (a.value, b.value, shelf.rejected) == (b"kept", b"new", ["b"])


def test_only_changes_are_written_and_a_full_disk_is_survived() -> None:
    async def scenario() -> list[list[str]]:
        shelf, part = Shelf(), Part()
        saver = rounds.Saver(shelf.store, {"a": part})
        keeping = asyncio.create_task(saver.keep(inline))
        seen = []
        for value in (b"1", b"1", b"2"):
            part.value = value
            await asyncio.sleep(rounds.SAVE_S * 1.001)
            seen.append(list(shelf.saved))
        shelf.full, part.value = True, b"3"
        await asyncio.sleep(rounds.SAVE_S * 1.001)
        shelf.full = False
        await asyncio.sleep(rounds.SAVE_S * 1.001)
        seen.append(list(shelf.saved))
        assert shelf.files == {"a": b"3"}
        part.value = b"4"
        saver.write()
        saver.write()
        assert shelf.files == {"a": b"4"}
        seen.append(list(shelf.saved))
        keeping.cancel()
        await asyncio.wait([keeping])
        return seen

    assert [len(s) for s in run_virtual(scenario())] == [1, 1, 2, 3, 4]


def test_a_write_left_behind_never_overtakes_a_later_one() -> None:
    async def scenario() -> bytes:
        shelf, part = Shelf(), Part()
        saver = rounds.Saver(shelf.store, {"a": part})
        late: list[Callable[[], Any]] = []

        async def hold(work: Callable[..., Any], *given: object) -> None:
            late.append(lambda: work(*given))

        keeping = asyncio.create_task(saver.keep(hold))
        await asyncio.sleep(rounds.SAVE_S * 1.001)
        keeping.cancel()
        await asyncio.wait([keeping])
        part.value = b"last"
        saver.write()
        for work in late:
            work()
        return shelf.files["a"]

    assert run_virtual(scenario()) == b"last"


@pytest.mark.parametrize("step", ["keep", "write"])
def test_without_a_store_nothing_happens(step: str) -> None:
    async def scenario() -> None:
        saver = rounds.Saver(None, {"a": Part()})
        if step == "keep":
            await saver.keep(inline)
        else:
            saver.write()

    run_virtual(scenario())
