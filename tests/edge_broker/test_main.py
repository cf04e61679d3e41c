"""The edge as its command starts it: state goes to the configured folder, and a folder that cannot be used is named."""

import asyncio
from pathlib import Path

import pytest

import edge_broker.__main__ as edge
from edge_broker.service import EdgeService
from fedhlm.config import load
from fedhlm.errors import ConfigError
from fedhlm.settings import Config
from fedhlm.telemetry import Counters


def config(folder: Path) -> Config:
    flags = {"edge.embedded_port": "0", "edge.state": str(folder), "federation.round_updates": "7", "edge.memory": "5"}
    return load(environ={}, flags=flags).config


async def test_state_is_written_when_the_edge_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: asyncio.Queue[EdgeService] = asyncio.Queue()
    serve = EdgeService.run

    async def run(service: EdgeService) -> None:
        running.put_nowait(service)
        await serve(service)

    monkeypatch.setattr(EdgeService, "run", run)
    task = asyncio.create_task(edge.run(config(tmp_path / "state"), Counters()))
    async with asyncio.timeout(20.0):
        service = await running.get()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["edge-home.federation", "edge-home.memory"]
    assert service.members.federation.round_updates == 7
    assert service.memory._tokens.capacity == 5


async def test_a_folder_that_cannot_be_used_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        await edge.run(config(tmp_path / "file"), Counters())
    assert caught.value.key == "edge.state"
