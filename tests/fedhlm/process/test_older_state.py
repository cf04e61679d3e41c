"""State files of an older version: every part sets them aside with a clear warning and starts afresh."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_verifier.service import FEDERATION_FILE
from edge_agent.core import LEARNER_FILE
from edge_agent.learner import Learner
from edge_broker.memory import ClusterMemory
from edge_broker.service import federation_file, memory_file
from fedhlm.learning.federation import Members, mean_of_agents
from fedhlm.peers.context_keys import DIMS
from fedhlm.peers.neighbours import Memory
from fedhlm.process.state import save, store_of
from fedhlm.protocol.messages import Contribution
from fedhlm.settings import Federation
from fedhlm_lab.sim.virtual import run_virtual
from tests.edge_agent import test_keeping
from tests.edge_broker.world import RULES, World, curve


class Folder:
    """A real folder, as `Disk` is one in memory."""

    def __init__(self, folder: Path) -> None:
        store = store_of(str(folder), key="state")
        assert store is not None
        self.store = store


def learner(folder: Path) -> bytes:
    disk: Any = Folder(folder)
    made = test_keeping.service(disk).agent.learner
    return made.snapshot()


def edge_federation(folder: Path) -> bytes:
    return bytes(World().edge("c1", store=Folder(folder).store).service.members.snapshot())


def edge_memory(folder: Path) -> bytes:
    return bytes(World().edge("c1", store=Folder(folder).store).service.memory.snapshot())


def cloud_federation(folder: Path) -> bytes:
    return bytes(World().cloud(store=Folder(folder).store).service.coordinator.members.snapshot())


def taught_learner() -> bytes:
    made = Learner(Federation(), np.random.default_rng(1))
    test_keeping.teach(made)
    return made.snapshot()


def full_members() -> bytes:
    members = Members(RULES, mean_of_agents)
    header: dict[str, Any] = {"version": 3, "sender": "a", "sequence": 1, "sent_ms": 1}
    members.take("a", Contribution(**header, round=1, members=1, curves={"u": curve(9.0).to_bytes()}), 0.0)
    return members.snapshot()


def full_memory() -> bytes:
    held = msgspec.msgpack.decode(ClusterMemory(64).snapshot())
    memory = Memory(64, DIMS, space=held[0])
    memory.add(np.ones(DIMS, np.int8), 7, "peer")
    return msgspec.msgpack.encode([held[0], held[1], memory.snapshot()])


def with_version(data: bytes, version: object) -> bytes:
    """The same state, as a version with fewer fields would have written it."""
    fields = msgspec.msgpack.decode(data)
    return msgspec.msgpack.encode([version, *fields[1:-1]])


def inner_version(data: bytes, version: object) -> bytes:
    *fields, memory = msgspec.msgpack.decode(data)
    return msgspec.msgpack.encode([*fields, with_version(memory, version)])


PARTS = [
    pytest.param(LEARNER_FILE, learner, taught_learner, lambda d: with_version(d, "learner/1"), id="agent"),
    pytest.param(
        federation_file("c1"), edge_federation, full_members, lambda d: with_version(d, 0), id="edge, federation"
    ),
    pytest.param(memory_file("c1"), edge_memory, full_memory, lambda d: inner_version(d, 0), id="edge, memory"),
    pytest.param(FEDERATION_FILE, cloud_federation, full_members, lambda d: with_version(d, 0), id="cloud"),
]


@pytest.mark.parametrize(("name", "start", "full", "older"), PARTS)
def test_state_of_an_older_version_is_set_aside_and_never_used(
    name: str,
    start: Callable[[Path], bytes],
    full: Callable[[], bytes],
    older: Callable[[bytes], bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        fresh = start(tmp_path / "empty")
        save(tmp_path / "today", name, full())
        assert start(tmp_path / "today") != fresh, "state of this version is used"
        assert not caplog.records
        save(tmp_path / "old", name, older(full()))
        assert start(tmp_path / "old") == fresh

    run_virtual(scenario())
    kept = {path.name for path in (tmp_path / "old").iterdir()}
    assert kept == {f"{name}.bad-1"}
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cannot be used (version of " in said
    assert said.endswith(f": starting afresh, the old file is kept as {name}.bad-1")
    assert ("got 'learner/1')" if name == LEARNER_FILE else "got 0)") in said
