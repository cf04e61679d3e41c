"""The doctor looks at the server of a cloud's model: over real HTTP, each fault made for real."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedhlm_fleet.doctor import local, machine
from fedhlm_fleet.doctor.finding import Remark, Subject
from fedhlm_zoo.shipped import model_folder
from tests.fedhlm_fleet.doctor.test_local import subject
from tests.vllm_server import NAME, VllmServer, serving

LLM = model_folder("", "llm")


@contextmanager
def beside(server: VllmServer) -> Iterator[VllmServer]:
    """The server, on a loop of its own thread, as the doctor's checks block."""
    ready, over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(server):
            ready.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60.0)
        yield server
    finally:
        over.set()
        thread.join()


def looked_at(server: VllmServer) -> tuple[Remark, Subject]:
    given = subject("cloud", cloud__model=server.url, cloud__server__tokenizer=str(LLM))
    return local.model(given), given


def test_a_model_on_a_server_is_checked_where_it_runs(tmp_path: Path) -> None:
    with beside(VllmServer(LLM)) as server:
        said, given = looked_at(server)
        assert said.level == "ok", said.found
        assert f"{NAME} at {server.url}, context 511" in said.found
        assert given.model is not None
        assert given.model.fingerprint.model == NAME
        assert local.speed(given).level == local.blocks(given).level == "skip"
        assert machine.memory(given).level in ("ok", "warn")
        server.jitter = 0.1
        said, _ = looked_at(server)
        assert said.level == "warn"
        assert "VLLM_BATCH_INVARIANT" in said.advice
        server.shift = 1
        said, _ = looked_at(server)
        assert said.level == "fail"
        assert "cloud.server.tokenizer" in said.found
    said, _ = looked_at(server)
    assert said.level == "fail"
    assert "cannot be reached" in said.found
    key = tmp_path / "key"
    key.write_text("sk-1")
    key.chmod(0o644)
    said = local.key_files(subject("cloud", cloud__model=server.url, cloud__server__key=str(key)))
    assert "cloud.server.key" in said.found
    assert local.key_files(subject("agent", cloud__model=server.url, cloud__server__key=str(key))).level == "skip"
