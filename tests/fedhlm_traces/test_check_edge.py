"""An edge's journal is decided again alike by the code that made it, and otherwise by any other, with the reason in words."""

from collections.abc import Callable
from functools import lru_cache

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_broker.journal import EdgeStart
from edge_broker.memory import ClusterMemory, PeersAnswer
from edge_broker.relay import Relay
from fedhlm.learning import federation
from fedhlm.learning.thresholds import PaperUpdate
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Escalation, Hints, RoutedVerdict, VerdictBatch
from fedhlm_traces.check.divergence import plain
from fedhlm_traces.check.edge import check_edge
from fedhlm_traces.check.journals import PartJournal
from tests.fedhlm_traces.recorded import lives_of, pool_otherwise, record

PRESETS = ("exact", "budget", "fedhlm")
BY_TIMER = (topics.CLOUD_VERIFY, topics.NEIGHBOUR, topics.EDGE_STATUS)
Patch = Callable[[pytest.MonkeyPatch], None]


@lru_cache(maxsize=64)
def edges(preset: str, seed: int, *, faults: bool = False) -> tuple[PartJournal, ...]:
    return tuple(lives_of(record(preset, seed, faults=faults, keeps=bool(seed % 2)), "edge"))


@settings(max_examples=8, deadline=None)
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 1_000), faults=st.booleans())
def test_the_code_that_made_a_journal_decides_the_same(preset: str, seed: int, faults: bool) -> None:
    lives = edges(preset, seed, faults=faults)
    assert lives
    for life in lives:
        outcome = check_edge(life)
        assert not outcome.divergences, plain(outcome.divergences)
        if not outcome.skipped:
            assert outcome.notes == life.notes
        if not faults:
            assert life.whole
            assert not outcome.skipped
            assert outcome.decisions > 50


def relay_all(patch: pytest.MonkeyPatch) -> None:
    """Verdicts are relayed whatever epoch they are of."""
    patch.setattr(Relay, "answers", lambda _self, batch: list(batch.items))


def relay_newer(patch: pytest.MonkeyPatch) -> None:
    """Only verdicts of a newer epoch than the newest are relayed."""

    def answers(self: Relay, batch: VerdictBatch) -> list[RoutedVerdict]:
        return [a for a in batch.items if a.verdict.epoch > self._epochs.get((a.agent, a.verdict.session), 0)]

    patch.setattr(Relay, "answers", answers)


def compare_by(similarity: float) -> Patch:
    """Another similarity than the one that the block asks for decides."""
    original = ClusterMemory.answer

    def answer(self: ClusterMemory, agent: str, escalation: Escalation, vocab_size: int) -> PeersAnswer | None:
        hints = escalation.hints
        if isinstance(hints, Hints) and hints.similarity is not None:
            other = msgspec.structs.replace(hints, similarity=similarity)
            escalation = msgspec.structs.replace(escalation, hints=other)
        return original(self, agent, escalation, vocab_size)

    return lambda patch: patch.setattr(ClusterMemory, "answer", answer)


def learn_less(patch: pytest.MonkeyPatch) -> None:
    """Of what a verdict settled only the first token is learnt."""
    original = ClusterMemory.learn
    patch.setattr(ClusterMemory, "learn", lambda *given: original(*given)[:0])


def average_otherwise(patch: pytest.MonkeyPatch) -> None:
    """Half of the smallest threshold instead of the mean: the guard leaves two members' thresholds equal."""

    def smaller(updates: list[PaperUpdate]) -> float | None:
        return min((update.threshold / 2.0 for update in updates), default=None)

    patch.setattr(federation, "cluster_mean", smaller)


MUTANTS: dict[str, tuple[Patch, str, bool, tuple[str, ...]]] = {
    "relay all": (relay_all, "exact", True, ("not relayed", "older than the session's newest")),
    "relay newer": (relay_newer, "exact", False, ("not relayed", "the newest of its session")),
    "nearer": (compare_by(1.0), "fedhlm", False, ("not answered here", "similarity 0.8 asked: near enough")),
    "farther": (compare_by(0.0), "fedhlm", False, ("stand by", "similarity 0.8 asked: too far")),
    "learn less": (learn_less, "budget", False, ("not told", "the cloud's verdict on base")),
    "average": (average_otherwise, "fedhlm", False, ("threshold of ", "are put together otherwise")),
    "pool": (pool_otherwise, "budget", False, ("sum of weight", "are put together otherwise")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_rule_is_caught_with_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, preset, faults, words = MUTANTS[name]
    recorded = [life for seed in range(4) for life in edges(preset, seed, faults=faults)]
    mutate(monkeypatch)
    outcomes = [(life, check_edge(life)) for life in recorded]
    told = [d for _, outcome in outcomes for d in outcome.divergences]
    assert any(all(word in plain([d]) for word in words) for d in told), plain(told[:3])
    for life, outcome in outcomes:
        updated = msgspec.structs.replace(life, notes=outcome.notes)
        again = check_edge(updated)
        assert not again.divergences, plain(again.divergences)
        assert again.notes == updated.notes
    monkeypatch.undo()
    back = [
        check_edge(msgspec.structs.replace(life, notes=outcome.notes)).divergences
        for life, outcome in outcomes
        if outcome.divergences
    ]
    assert any(back)


@settings(max_examples=15, deadline=None)
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 2), data=st.data())
def test_a_decision_that_is_missing_from_the_journal_is_found(preset: str, seed: int, data: st.DataObject) -> None:
    life = data.draw(st.sampled_from(edges(preset, seed)))
    inputs = [i for i, note in enumerate(life.notes) if note.kind in ("heard", "round")]
    decisions = [
        i
        for i, note in enumerate(life.notes)
        if note.kind == "sent" and i < inputs[-1] and (topics.lookup(note.subject) or [None])[0] not in BY_TIMER
    ]
    missing = data.draw(st.sampled_from(decisions))
    notes = life.notes[:missing] + life.notes[missing + 1 :]
    outcome = check_edge(msgspec.structs.replace(life, notes=notes))
    assert outcome.divergences
    assert outcome.notes == life.notes or len(outcome.notes) == len(life.notes)


@settings(max_examples=10, deadline=None)
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 2), data=st.data())
def test_what_the_bus_had_no_room_for_then_is_dropped_now(preset: str, seed: int, data: st.DataObject) -> None:
    life = data.draw(st.sampled_from(edges(preset, seed)))
    sent = [i for i, note in enumerate(life.notes) if note.kind == "sent"]
    dropped = data.draw(st.sets(st.sampled_from(sent)))
    notes = [msgspec.structs.replace(n, kind="dropped") if i in dropped else n for i, n in enumerate(life.notes)]
    outcome = check_edge(msgspec.structs.replace(life, notes=notes))
    assert not outcome.divergences
    assert outcome.notes == notes


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 2), share=st.floats(0.0, 1.0))
def test_the_beginning_of_a_journal_can_be_checked_alone(preset: str, seed: int, share: float) -> None:
    for life in edges(preset, seed):
        notes = life.notes[: 1 + int(share * (len(life.notes) - 1))]
        outcome = check_edge(msgspec.structs.replace(life, notes=notes, complaint="a gap"))
        assert not outcome.divergences, plain(outcome.divergences)
        assert "a gap" in outcome.skipped


@pytest.mark.parametrize("preset", PRESETS)
def test_an_edge_between_two_brokers_is_read_by_both_roots(preset: str) -> None:
    life = edges(preset, 0)[0]
    names = {f"fedhlm/1/{level}/": f"up/2/{level}/" for level in ("cloud", "neighbour", "federation")}
    notes = []
    for note in life.notes:
        name = next((n.replace(a, b) for a, b in names.items() if (n := note.subject).startswith(a)), note.subject)
        notes.append(msgspec.structs.replace(note, subject=name))
    born = msgspec.msgpack.decode(notes[0].data, type=EdgeStart)
    born = msgspec.structs.replace(born, up_root="up/2")
    notes[0] = msgspec.structs.replace(notes[0], data=msgspec.msgpack.encode(born))
    outcome = check_edge(msgspec.structs.replace(life, notes=notes))
    assert not outcome.divergences, plain(outcome.divergences)
    assert outcome.notes == notes
    assert outcome.decisions == check_edge(life).decisions


def test_a_journal_without_its_beginning_is_passed_over_in_words() -> None:
    life = edges("exact", 0)[0]
    outcome = check_edge(msgspec.structs.replace(life, notes=life.notes[1:], number=1))
    assert outcome.decisions == 0
    assert "without the beginning" in outcome.skipped[0]
    broken = [msgspec.structs.replace(life.notes[0], data=b"\x80"), *life.notes[1:]]
    assert "not one of this version" in check_edge(msgspec.structs.replace(life, notes=broken)).skipped[0]
