"""The virtual clock: what passes instantly, in what order, and what is refused."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from fedhlm_lab.sim.virtual import VirtualLoop, VirtualTimeError, run_virtual


def now() -> float:
    return asyncio.get_running_loop().time()


def test_an_hour_of_sleep_takes_no_time_and_the_clock_says_an_hour() -> None:
    async def main() -> float:
        await asyncio.sleep(3_600.0)
        return now()

    before_s = time.perf_counter()
    assert run_virtual(main(), start=100.0) == 3_700.0
    assert time.perf_counter() - before_s < 60.0


def test_timers_run_by_time_and_those_of_one_instant_in_order_of_creation() -> None:
    seen: list[tuple[float, str]] = []

    def note(name: str) -> None:
        seen.append((now(), name))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for name in "abc":
            loop.call_later(2.0, note, name)
        loop.call_at(1.0, note, "first")
        loop.call_later(1.5, note, "cancelled").cancel()
        loop.call_soon(note, "soon")
        await asyncio.sleep(2.0)

    run_virtual(main())
    assert seen == [(0.0, "soon"), (1.0, "first"), (2.0, "a"), (2.0, "b"), (2.0, "c")]


def test_time_stands_still_while_something_is_ready() -> None:
    async def main() -> None:
        for _ in range(1_000):
            await asyncio.sleep(0)
        assert now() == 0.0

    run_virtual(main())


def test_timeouts_fire_on_virtual_time() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await asyncio.Event().wait()
        assert now() == 5.0
        async with asyncio.timeout(5.0):
            await asyncio.sleep(4.0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(9.0), timeout=1.0)
        assert now() == 10.0

    run_virtual(main())


def test_queues_locks_and_task_groups_work() -> None:
    async def main() -> list[int]:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=2)
        got: list[int] = []

        async def produce() -> None:
            for i in range(10):
                await queue.put(i)

        async def consume() -> None:
            for _ in range(10):
                got.append(await queue.get())
                await asyncio.sleep(0.1)

        async with asyncio.TaskGroup() as group:
            group.create_task(produce(), name="produce")
            group.create_task(consume(), name="consume")
        assert now() == pytest.approx(1.0)
        return got

    assert run_virtual(main()) == list(range(10))


def test_a_standstill_names_every_waiting_task() -> None:
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.sleep(7.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(waits_for_ever(), name="the agent")
            group.create_task(waits_for_ever(), name="the edge")

    with pytest.raises(VirtualTimeError, match=r"deadlock at t=7 s.*main at .*the agent at .*the edge at"):
        run_virtual(main())


def test_threads_and_sockets_are_refused() -> None:
    async def executor() -> None:
        await asyncio.to_thread(lambda: None)

    async def connection() -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    async def server() -> None:
        await asyncio.start_server(lambda _, __: None, "127.0.0.1", 0)

    for coroutine, word in ((executor(), "threads"), (connection(), "sockets"), (server(), "sockets")):
        with pytest.raises(VirtualTimeError, match=word):
            run_virtual(coroutine)


def test_a_call_from_another_thread_is_refused() -> None:
    errors: list[BaseException] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def intrude() -> None:
            try:
                loop.call_soon_threadsafe(lambda: None)
            except VirtualTimeError as exc:
                errors.append(exc)

        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    run_virtual(main())
    assert len(errors) == 1


def test_the_error_of_the_main_coroutine_comes_out() -> None:
    async def main() -> None:
        await asyncio.sleep(1.0)
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        run_virtual(main())


def test_an_error_in_a_callback_ends_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1.0, lambda: 1 // 0)
        await asyncio.sleep(100.0)

    with pytest.raises(ZeroDivisionError):
        run_virtual(main())


def test_what_is_left_running_is_cancelled_and_generators_are_closed() -> None:
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            await asyncio.sleep(1.0)
            ended.append("background")

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(1.0)
            ended.append("generator")

    kept: list[AsyncIterator[int]] = []

    async def main() -> int:
        kept.append(numbers())
        task = asyncio.get_running_loop().create_task(background(), name="background")
        await asyncio.sleep(1.0)
        assert not task.done()
        return await anext(kept[0])

    assert run_virtual(main()) == 1
    assert sorted(ended) == ["background", "generator"]


def test_virtual_time_does_not_start_inside_a_running_loop() -> None:
    async def inner() -> None: ...

    async def main() -> None:
        with pytest.raises(VirtualTimeError, match="inside a running event loop"):
            run_virtual(inner())

    asyncio.run(main())


def test_cancelled_timers_do_not_pile_up() -> None:
    async def main() -> int:
        for _ in range(5_000):
            async with asyncio.timeout(3_600.0):
                await asyncio.sleep(0.001)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        return len(loop._timers)

    assert run_virtual(main()) < 1_000


def test_two_runs_of_the_same_program_take_the_same_course() -> None:
    def course() -> list[tuple[float, int]]:
        seen: list[tuple[float, int]] = []

        async def worker(number: int) -> None:
            for step in range(20):
                await asyncio.sleep(((number * 7 + step * 3) % 5) / 4)
                seen.append((now(), number))

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(10):
                    group.create_task(worker(number), name=f"worker {number}")

        run_virtual(main())
        return seen

    assert course() == course()
