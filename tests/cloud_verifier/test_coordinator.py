"""Profiles become features, groups become orders; nothing a profile says can stop the cloud from verifying."""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cloud_verifier import coordinator
from cloud_verifier.clustering import TOKENS_MAX, TOKENS_MIN, Clusterer, Sample
from cloud_verifier.coordinator import COLUMNS, Coordinator, sample_of
from fedhlm.errors import ProtocolError
from fedhlm.learning.federation import Members, mean_of_clusters
from fedhlm.peers.context_keys import DIMS
from fedhlm.protocol import topics
from fedhlm.protocol.messages import SCHEMA_VERSION, Assignment, Profile
from fedhlm.settings import Federation
from fedhlm_lab.sim.virtual import run_virtual
from tests.edge_broker.world import Hand, World, contribute

HEADER: dict[str, Any] = {"version": SCHEMA_VERSION, "sender": "a", "sequence": 1, "sent_ms": 1}


def profile(agent: str = "a", *, tokens: int = 3, centre: int = 0, dims: int = DIMS, seed: int = 0) -> Profile:
    rng = np.random.default_rng(seed)
    keys = np.clip(rng.normal(0.0, 30.0, (tokens, dims)), -60, 60)
    keys[:, 0] += centre
    return Profile(
        **HEADER,
        agent=agent,
        dims=dims,
        keys=keys.astype(np.int8).tobytes(),
        uncertainties=rng.integers(0, 256, tokens).astype(np.uint8).tobytes(),
    )


class Fake:
    """Groups as told, and remembers what it saw."""

    def __init__(self, *moves: Mapping[str, str]) -> None:
        self.moves = list(moves)
        self.noted: list[tuple[str, str, int]] = []

    def note_profile(self, agent: str, cluster: str, sample: Sample) -> None:
        self.noted.append((agent, cluster, len(sample.features)))

    def due(self, _now_s: float) -> bool:
        return bool(self.moves)

    def compute(self, _now_s: float) -> Mapping[str, str]:
        return self.moves.pop(0)


def members() -> Members:
    return Members(Federation(), mean_of_clusters)


def test_features_are_keys_within_one_and_uncertainties() -> None:
    keys = np.full((2, DIMS), 127, np.int8)
    keys[1] = -127
    made = Profile(**HEADER, agent="a", dims=DIMS, keys=keys.tobytes(), uncertainties=bytes([0, 255]))
    features = sample_of(made).features
    assert features.dtype == np.float32
    assert features.tolist() == [[1.0] * DIMS + [0.0], [-1.0] * DIMS + [1.0]]


@pytest.mark.parametrize(
    "wrong", [{"dims": DIMS - 1}, {"keys": b"123"}, {"uncertainties": b"1234"}], ids=["dims", "keys", "uncertainties"]
)
def test_a_profile_whose_lengths_disagree_is_refused(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"dims": DIMS, "keys": bytes(3 * DIMS), "uncertainties": b"123"}
    sample_of(Profile(**HEADER, agent="a", **given))
    with pytest.raises(ProtocolError, match="profile.keys must be .* bytes for each"):
        sample_of(Profile(**HEADER, agent="a", **(given | wrong)))


def test_the_latest_profile_of_each_agent_is_handed_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "PROFILES_MAX", 2)
    grouping = Fake()
    cloud = Coordinator(members(), grouping)
    for agent, tokens in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        cloud.note_profile("c1", profile(agent, tokens=tokens))
    assert not cloud.prepare(0.0)
    cloud.prepare(1.0)
    assert grouping.noted == [("a", "c1", 3), ("c", "c1", 4)]


def test_without_grouping_profiles_cost_nothing() -> None:
    cloud = Coordinator.of(Federation(assign_s=0.0))
    cloud.note_profile("c1", profile(dims=DIMS - 1))
    assert cloud.grouping is None
    assert not cloud.prepare(0.0)
    assert cloud.regroup(0.0) == {}
    assert isinstance(Coordinator.of(Federation(assign_s=1.0)).grouping, Clusterer)


def test_assignments_are_retained_for_those_that_move_and_only_for_them() -> None:
    async def scenario() -> None:
        world = World()
        grouping = Fake({"a": "c2"}, {}, {"a": "c1", "b": "c2"})
        await world.cloud(grouping=grouping, assign_s=10.0).start()
        await world.edge("c1").start()
        agent = await Hand(world, "a").start(topics.ASSIGN.name(agent="+"))
        await agent.send(topics.PROFILE, profile("a"), cluster="c1", agent="a")
        await asyncio.sleep(9.0)
        assert agent.heard == []
        await asyncio.sleep(2.0)
        assert [(n, m.cluster) for n, m in agent.heard if isinstance(m, Assignment)] == [
            (topics.ASSIGN.name(agent="a"), "c2")
        ]
        await asyncio.sleep(100.0)
        assert [m.cluster for m in agent.of(Assignment)] == ["c2", "c1", "c2"]
        assert grouping.noted == [("a", "c1", 3)]
        late = await Hand(world, "late").start(topics.ASSIGN.name(agent="a"))
        assert [m.cluster for m in late.of(Assignment)] == ["c1"]
        assert world.counters["assignments"] == 3

    run_virtual(scenario())


def test_a_grouping_that_fails_and_a_bad_profile_leave_the_cloud_at_work() -> None:
    class Broken(Fake):
        def compute(self, _now_s: float) -> Mapping[str, str]:
            self.moves.pop(0)
            raise FloatingPointError("no convergence")

    async def scenario() -> None:
        world = World()
        await world.cloud(grouping=Broken({}, {}), assign_s=10.0).start()
        await world.edge("c1").start()
        agent = await Hand(world, "a").start(topics.CLOUD_FL_STATE.name())
        await agent.send(topics.PROFILE, profile("a", dims=DIMS - 1), cluster="c1", agent="a")
        assert world.counters["refused_messages"] == 1
        await asyncio.sleep(30.0)
        await contribute(agent, 1, 10.0)
        await asyncio.sleep(5.0)
        assert agent.heard

    run_virtual(scenario())


def test_real_profiles_part_agents_that_write_of_different_things() -> None:
    """Two kinds of agents, one of each in the wrong cluster: exactly those two move."""
    grouping = Clusterer((), columns=COLUMNS, interval_s=1.0)
    cloud = Coordinator(members(), grouping)
    kinds = {
        "a1": ("c1", 60),
        "a2": ("c1", 60),
        "a3": ("c2", 60),
        "b1": ("c2", -60),
        "b2": ("c2", -60),
        "b3": ("c1", -60),
    }
    for seed, (agent, (cluster, centre)) in enumerate(kinds.items()):
        cloud.note_profile(cluster, profile(agent, tokens=2 * TOKENS_MIN, centre=centre, seed=seed))
    assert cloud.prepare(0.0)
    assert cloud.regroup(0.0) == {"a3": "c1", "b3": "c2"}
    assert not cloud.prepare(0.0)


def test_of_a_long_profile_the_last_tokens_are_kept() -> None:
    long = profile(tokens=TOKENS_MAX + 50)
    features = sample_of(long).features
    assert features.shape == (TOKENS_MAX, COLUMNS)
    assert features[-1, -1] == np.float32(long.uncertainties[-1] / 255)
    assert features[0, -1] == np.float32(long.uncertainties[50] / 255)
