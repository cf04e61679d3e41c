"""State is restored when a part starts, written when it has changed, and never by an older write."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fedhlm.errors import ConfigError, ProtocolError
from fedhlm.process.saver import SAVE_S, Saver, inline
from fedhlm.process.state import Store
from fedhlm_lab.sim.virtual import run_virtual


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


def test_what_was_saved_is_restored_and_what_is_not_understood_is_put_aside() -> None:
    shelf, a, b = Shelf(a=b"kept", b=b"bad"), Part(), Part()
    Saver(shelf.store, {"a": a, "b": b})
    assert (a.value, b.value, shelf.rejected) == (b"kept", b"new", ["b"])


def test_only_changes_are_written_and_a_full_disk_is_survived() -> None:
    async def scenario() -> list[list[str]]:
        shelf, part = Shelf(), Part()
        saver = Saver(shelf.store, {"a": part}, in_thread=inline)
        keeping = asyncio.create_task(saver.keep())
        seen = []
        for value in (b"1", b"1", b"2"):
            part.value = value
            await asyncio.sleep(SAVE_S * 1.001)
            seen.append(list(shelf.saved))
        shelf.full, part.value = True, b"3"
        await asyncio.sleep(SAVE_S * 1.001)
        shelf.full = False
        await asyncio.sleep(SAVE_S * 1.001)
        seen.append(list(shelf.saved))
        assert shelf.files == {"a": b"3"}
        part.value = b"4"
        saver.flush()
        saver.flush()
        assert shelf.files == {"a": b"4"}
        seen.append(list(shelf.saved))
        keeping.cancel()
        await asyncio.wait([keeping])
        return seen

    assert [len(s) for s in run_virtual(scenario())] == [1, 1, 2, 3, 4]


def test_a_write_left_behind_never_overtakes_a_later_one() -> None:
    async def scenario() -> bytes:
        shelf, part = Shelf(), Part()
        late: list[Callable[[], Any]] = []

        async def hold(work: Callable[..., Any], *given: object) -> None:
            late.append(lambda: work(*given))

        saver = Saver(shelf.store, {"a": part}, in_thread=hold)
        keeping = asyncio.create_task(saver.keep())
        await asyncio.sleep(SAVE_S * 1.001)
        keeping.cancel()
        await asyncio.wait([keeping])
        part.value = b"last"
        saver.flush()
        for work in late:
            work()
        return shelf.files["a"]

    assert run_virtual(scenario()) == b"last"


@pytest.mark.parametrize("step", ["keep", "flush"])
def test_without_a_store_nothing_happens(step: str) -> None:
    async def scenario() -> None:
        saver = Saver(None, {"a": Part()})
        if step == "keep":
            await saver.keep()
        else:
            saver.flush()

    run_virtual(scenario())
