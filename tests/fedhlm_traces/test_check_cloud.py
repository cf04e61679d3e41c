"""A cloud's journal is decided again alike by the code and the model that made it, and otherwise by any other."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_verifier.engine import Engine, EngineInput, EngineOutput
from cloud_verifier.sessions import Sessions
from fedhlm.decoding import couplings
from fedhlm.errors import TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.messages import Sampling, VerdictBatch
from fedhlm_lab.sim import toy
from fedhlm_traces.check.cloud import check_cloud, from_bus
from fedhlm_traces.check.divergence import plain
from fedhlm_traces.check.journals import PartJournal
from fedhlm_traces.file import Record
from tests.fedhlm_traces.recorded import engine, lives_of, pool_otherwise, record

PRESETS = ("exact", "budget", "fedhlm", "u-hlm", "speculative")
Patch = Callable[[pytest.MonkeyPatch], None]


@lru_cache(maxsize=64)
def run(preset: str, seed: int, *, faults: bool = False) -> tuple[Record, ...]:
    return tuple(record(preset, seed, faults=faults, keeps=bool(seed % 2)))


def clouds(preset: str, seed: int, *, faults: bool = False) -> list[PartJournal]:
    return lives_of(list(run(preset, seed, faults=faults)), "cloud")


@settings(max_examples=8, deadline=None)
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 1_000), faults=st.booleans())
def test_the_code_that_made_a_journal_decides_the_same(preset: str, seed: int, faults: bool) -> None:
    lives = clouds(preset, seed, faults=faults)
    assert lives
    for life in lives:
        outcome = check_cloud(life, engine())
        assert not outcome.divergences, plain(outcome.divergences)
        assert outcome.notes == life.notes
        if not faults:
            assert life.whole
            assert not outcome.skipped
            assert outcome.decisions > 50


@settings(max_examples=6, deadline=None)
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 1_000), began=st.floats(0.0, 0.5))
def test_the_bus_alone_says_enough_of_the_verdicts(preset: str, seed: int, began: float) -> None:
    """Also where the recorder came late: sessions whose beginning it missed are counted, not blamed."""
    records = run(preset, seed)
    first = round(began * len(records))
    status = [
        r for r in records[:first] if topics.CLOUD_STATUS.parse(r.topic) is not None
    ]  # retained: the late hear it too
    life = from_bus([*status, *records[first:]], "cloud", eos_ids=frozenset({toy.EOS_ID}), context_max=toy.CONTEXT)
    outcome = check_cloud(life, engine())
    assert not outcome.divergences, plain(outcome.divergences)
    assert outcome.notes == life.notes
    if first == 0:
        assert not outcome.skipped
        assert outcome.decisions > 50


def test_of_other_parts_the_bus_says_too_little() -> None:
    with pytest.raises(TraceError, match="without its journal what the edge took in is not known"):
        from_bus(run("exact", 0), "edge")
    with pytest.raises(TraceError, match="cloud/status"):
        from_bus([], "cloud")


def other_noise(patch: pytest.MonkeyPatch) -> None:
    """Tokens are drawn with another seed now and then."""
    gumbel = couplings.COUPLINGS["gumbel"]

    def settle(logits: Any, sampling: Sampling, position: int, draft: int | None, law: bytes) -> int:
        seed = sampling.seed + (position % 7 == 0)
        return gumbel.settle(logits, msgspec.structs.replace(sampling, seed=seed), position, draft, law)

    patch.setitem(couplings.COUPLINGS, "gumbel", gumbel._replace(settle=settle))


def accept_less(patch: pytest.MonkeyPatch) -> None:
    """A draft stands with half the probability."""
    original = couplings.acceptance
    patch.setattr(couplings, "acceptance", lambda q, p: 0.5 * original(q, p))


def refuse_all(patch: pytest.MonkeyPatch) -> None:
    """Blocks beyond a short text are refused."""
    original = Sessions.__init__

    def init(self: Sessions, **named: Any) -> None:
        original(self, **{**named, "context_max": 12})

    patch.setattr(Sessions, "__init__", init)


def forget_epochs(patch: pytest.MonkeyPatch) -> None:
    """Every prime is forgotten at once."""
    original = Sessions._admit

    def admit(self: Sessions, key: Any, escalation: Any) -> Any:
        self.forget(key)
        return original(self, key, escalation)

    patch.setattr(Sessions, "_admit", admit)


MUTANTS: dict[str, tuple[Patch, str, tuple[str, ...]]] = {
    "noise": (
        other_noise,
        "exact",
        ("probabilities are the same, so the rule", "with the seed's noise", "the best is"),
    ),
    "acceptance": (accept_less, "u-hlm", ("draft id", "stands, p(d)", "is replaced by", "u to accept is")),
    "context": (refuse_all, "exact", ("settled", "refused escalation reaches position", "with")),
    "sessions": (forget_epochs, "exact", ("settled", "unprimed", "without a prime")),
    "pool": (pool_otherwise, "budget", ("sum of weight", "are put together otherwise")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_rule_is_caught_with_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, preset, words = MUTANTS[name]
    (life,) = clouds(preset, 0)
    mutate(monkeypatch)
    outcome = check_cloud(life, engine())
    assert any(all(word in plain([d]) for word in words) for d in outcome.divergences), plain(outcome.divergences[:3])
    updated = msgspec.structs.replace(life, notes=outcome.notes)
    again = check_cloud(updated, engine())
    assert not again.divergences, plain(again.divergences)
    assert again.notes == updated.notes
    monkeypatch.undo()
    # That a session was not held is a fact of memory, which the code of today cannot contradict.
    assert bool(check_cloud(updated, engine()).divergences) == (name != "sessions")


def other_model(scale: float) -> Engine:
    """The toy LLM with its logits scaled."""

    async def forward(requests: Sequence[EngineInput]) -> list[EngineOutput]:
        outputs = await toy.large_forward(requests, step_s=0.0)
        return [EngineOutput(scale * output.logits, output.cache) for output in outputs]

    return Engine(toy.ToyCache(), forward)


def test_another_model_is_named_as_the_cause() -> None:
    (life,) = clouds("exact", 0)
    assert not check_cloud(life, other_model(1.0 + 1e-9)).divergences
    divergences = check_cloud(life, other_model(1.1)).divergences
    assert divergences
    assert all("the model's law is another: p of draft" in d.why for d in divergences)


@settings(max_examples=8, deadline=None)
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 2), data=st.data())
def test_a_verdict_that_says_something_else_is_found(preset: str, seed: int, data: st.DataObject) -> None:
    (life,) = clouds(preset, seed)
    places = [
        (i, item)
        for i, note in enumerate(life.notes)
        if note.kind == "sent" and topics.CLOUD_VERDICT.parse(note.subject)
        for item, answered in enumerate(_batch(note.data).items)
        if answered.verdict.status == "settled" and answered.verdict.ids
    ]
    number, item = data.draw(st.sampled_from(places))
    note = life.notes[number]
    batch = _batch(note.data)
    verdict = batch.items[item].verdict
    first = int.from_bytes(verdict.ids[:2], "little")
    ids = ((first + 1) % toy.VOCAB_SIZE).to_bytes(2, "little") + verdict.ids[2:]
    answered = msgspec.structs.replace(batch.items[item], verdict=msgspec.structs.replace(verdict, ids=ids))
    items = (*batch.items[:item], answered, *batch.items[item + 1 :])
    changed = msgspec.structs.replace(note, data=encode(msgspec.structs.replace(batch, items=items)))
    outcome = check_cloud(
        msgspec.structs.replace(life, notes=[*life.notes[:number], changed, *life.notes[number + 1 :]]), engine()
    )
    (divergence,) = outcome.divergences
    assert f"session {verdict.session} of {answered.agent}" in divergence.where
    assert f"id {(first + 1) % toy.VOCAB_SIZE}" in divergence.recorded
    assert f"id {first}" in divergence.now
    assert outcome.notes == life.notes


def _batch(data: bytes) -> VerdictBatch:
    message = decode(data)
    assert isinstance(message, VerdictBatch)
    return message


def test_without_its_model_only_the_federation_is_decided_again() -> None:
    (life,) = clouds("budget", 0)
    outcome = check_cloud(life, None)
    assert not outcome.divergences
    assert outcome.decisions > 1
    assert any("blocks not settled again: that takes the model 'toy'" in words for words in outcome.skipped)


@settings(max_examples=6, deadline=None)
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 2), share=st.floats(0.0, 1.0))
def test_the_beginning_of_a_journal_can_be_checked_alone(preset: str, seed: int, share: float) -> None:
    (life,) = clouds(preset, seed)
    notes = life.notes[: 1 + int(share * (len(life.notes) - 1))]
    outcome = check_cloud(msgspec.structs.replace(life, notes=notes), engine())
    assert not outcome.divergences, plain(outcome.divergences)


def test_a_journal_without_its_beginning_is_passed_over_in_words() -> None:
    (life,) = clouds("exact", 0)
    outcome = check_cloud(msgspec.structs.replace(life, notes=life.notes[1:], number=1), engine())
    assert outcome.decisions == 0
    assert "without the beginning" in outcome.skipped[0]
