"""The edge's memory answers only what verified neighbours agree on, and learns only what the cloud settled."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_broker import memory as module
from edge_broker.memory import DIGEST_MAX, DIGESTS_MAX, ClusterMemory, PeersAnswer
from fedhlm.decoding.sampling import law
from fedhlm.errors import ProtocolError
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    Escalation,
    Grammar,
    Hints,
    Prime,
    Sampling,
    Uncertain,
    UncertainTokens,
    Verdict,
    Verified,
    VerifiedTokens,
)
from fedhlm.protocol.packing import pack_bits, pack_ids, pack_probs
from fedhlm_lab.sim import toy

DIMS = 4
VOCAB = 50
HEADER: dict[str, Any] = {"version": SCHEMA_VERSION, "sender": "a", "sequence": 1, "sent_ms": 1}


def key(angle: int) -> bytes:
    """Keys at multiples of a right angle have nothing in common."""
    values = np.zeros(DIMS, np.int8)
    values[angle % DIMS] = 127 if angle < DIMS else -127
    return values.tobytes()


def doubt(*items: tuple[int, int, bytes], session: int = 1) -> UncertainTokens:
    return UncertainTokens(
        **HEADER, session=session, space="s", items=tuple(Uncertain(p, t, 0.9, k) for p, t, k in items)
    )


def block(
    ids: list[int],
    *,
    base: int = 10,
    fixed: int = 0,
    similarity: float | None = 0.9,
    votes: int = 1,
    session: int = 1,
    temperature: float | None = 0.8,
    grammar: Grammar | None = None,
) -> Escalation:
    """It carries the prime that says the `temperature`; none where that is None."""
    hints = None if similarity is None else Hints(similarity, votes)
    return Escalation(
        **HEADER,
        session=session,
        epoch=0,
        base=base,
        ids=pack_ids(ids, VOCAB),
        patience_ms=1,
        fixed=fixed,
        before=None if temperature is None else Prime(Sampling(1, temperature, grammar=grammar), toy.FINGERPRINT, b""),
        hints=hints,
    )


def verdict(
    accepted: int,
    ids: list[int],
    *,
    base: int = 10,
    missed: list[bool] | None = None,
    status: Literal["settled", "unprimed", "refused"] = "settled",
    probs: list[float] | None = None,
    session: int = 1,
) -> Verdict:
    """All ids that were looked at are certain for the target, unless `probs` says otherwise."""
    return Verdict(
        **HEADER,
        session=session,
        epoch=0,
        base=base,
        status=status,
        accepted=accepted,
        ids=pack_ids(ids, VOCAB),
        missed=pack_bits(missed or []),
        target_probs=pack_probs(np.ones(accepted + 1) if probs is None else np.array(probs)),
    )


def cluster(*known: tuple[bytes, int], capacity: int = 64) -> ClusterMemory:
    """A memory that has learnt these from its own cloud verdicts."""
    memory = ClusterMemory(capacity, dims=DIMS)
    for k, token in known:
        memory.doubt("teacher", doubt((0, token, k)))
        memory.await_verdict("teacher", block([token], base=0))
        assert memory.learn("teacher", verdict(1, [], base=0), VOCAB) == (Verified(k, token),)
    return memory


# Answers


def test_agreement_settles_the_whole_block() -> None:
    memory = cluster((key(0), 7))
    memory.doubt("a", doubt((11, 7, key(0))))
    assert memory.answer("a", block([3, 7, 4]), VOCAB) == PeersAnswer(3, "peer")


def test_without_room_it_answers_nothing_and_its_cluster_still_learns() -> None:
    memory = cluster((key(0), 7), capacity=0)
    memory.doubt("a", doubt((11, 7, key(0))))
    assert memory.size == 0
    assert memory.answer("a", block([3, 7, 4]), VOCAB) is None
    assert memory.take_digest() == (Verified(key(0), 7),)


def test_keys_of_another_space_are_refused_and_counted() -> None:
    memory = cluster((key(0), 7))
    memory.hear(VerifiedTokens(**HEADER, space="other", items=(Verified(key(1), 9),)))
    memory.doubt("a", replace(doubt((11, 7, key(0))), space="other"))
    assert (memory.size, memory.refused_keys) == (1, 2)
    assert memory.answer("a", block([3, 7, 4]), VOCAB) is None


def test_a_neighbours_token_makes_it_a_neighbours_answer() -> None:
    memory = cluster((key(0), 7))
    memory.hear(VerifiedTokens(**HEADER, space="s", items=(Verified(key(1), 9),)))
    memory.doubt("a", doubt((10, 7, key(0)), (11, 9, key(1))))
    assert memory.answer("a", block([7, 9]), VOCAB) == PeersAnswer(2, "neighbour")
    assert memory.answer("a", block([7]), VOCAB) == PeersAnswer(1, "peer")


@pytest.mark.parametrize(
    "escalation",
    [
        block([3, 7], similarity=None),
        block([3, 7], votes=2),
        block([3, 7], base=20),
        block([3, 7], session=2),
        block([3, 8]),
        block([3, 7], fixed=2),
        block([]),
        block([3, 7, 5]),
    ],
    ids=["not allowed", "votes", "position", "session", "another draft", "all fixed", "nothing", "one unknown doubt"],
)
def test_what_is_not_certain_goes_to_the_cloud(escalation: Escalation) -> None:
    memory = cluster((key(0), 7))
    memory.doubt("a", doubt((11, 7, key(0)), (12, 5, key(3))))
    assert memory.answer("a", block([3, 7]), VOCAB) is not None
    assert memory.answer("a", escalation, VOCAB) is None
    assert memory.answer("b", block([3, 7]), VOCAB) is None


def test_garbled_ids_and_tokens_of_another_vocabulary_go_to_the_cloud() -> None:
    memory = cluster()
    memory.hear(VerifiedTokens(**HEADER, space="s", items=(Verified(key(0), VOCAB),)))
    memory.doubt("a", doubt((10, 7, key(0))))
    assert memory.answer("a", block([7]), VOCAB) is None
    assert memory.answer("a", block([7]), 3) is None


@given(
    drafts=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    truth=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    doubted=st.sets(st.integers(0, 5)),
    known=st.sets(st.integers(0, 5)),
    fixed=st.integers(0, 6),
)
def test_a_block_stands_where_every_doubtful_token_is_known_to_be_right(
    drafts: list[int], truth: list[int], doubted: set[int], known: set[int], fixed: int
) -> None:
    fixed = min(fixed, len(drafts))
    memory = cluster(*((key(i), truth[i]) for i in sorted(known)))
    memory.doubt("a", doubt(*((10 + i, t, key(i)) for i, t in enumerate(drafts) if i in doubted)))
    before = memory.snapshot()
    evidence = memory.evidence("a", block(drafts, fixed=fixed), VOCAB)
    assert memory.snapshot() == before, "looking changes nothing"
    answer = memory.answer("a", block(drafts, fixed=fixed), VOCAB)
    assert [(e.position, e.token) for e in evidence] == [
        (10 + i, drafts[i]) for i in range(fixed, len(drafts)) if i in doubted
    ]
    assert (answer is not None) == (bool(evidence) and all(e.supports for e in evidence))
    asked = [i for i in range(fixed, len(drafts)) if i in doubted]
    wrong = [i for i in asked if i in known and truth[i] != drafts[i]]
    if not asked or wrong or not set(asked) <= known:
        assert answer is None
    else:
        assert answer == PeersAnswer(len(drafts), "peer")


# Learning


def test_accepted_drafts_and_the_greedy_replacement_are_learnt_where_they_were_doubtful() -> None:
    memory = cluster()
    memory.doubt("a", doubt((10, 1, key(0)), (12, 3, key(1)), (13, 4, key(2))))
    memory.await_verdict("a", block([1, 2, 3, 4], temperature=0.0))
    assert memory.learn("a", verdict(2, [8]), VOCAB) == (Verified(key(0), 1), Verified(key(1), 8))
    assert memory.size == memory.waiting == 2


def test_what_seed_temperature_and_law_can_choose_is_not_learnt() -> None:
    """Tokens stand, or were drawn, that the target does not think likeliest: of a law at temperature 10, say."""
    memory = cluster()
    memory.doubt("a", doubt(*((10 + i, 1 + i, key(i)) for i in range(4))))
    memory.await_verdict("a", block([1, 2, 3, 4], fixed=1, temperature=10.0))
    said = verdict(3, [8], probs=[0.02, 0.5, 0.51, 0.0])
    assert memory.learn("a", said, VOCAB) == (Verified(key(2), 3),)


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 10.0),
    st.floats(0.1, 1.0),
    st.one_of(st.none(), st.integers(1, 4)),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
)
def test_whatever_is_learnt_is_the_likeliest_token(
    seed: int, temperature: float, top_p: float, top_k: int | None, min_p: float | None
) -> None:
    """A liar asks for every token of a law in turn: only the target's choice is ever learnt."""
    logits = np.random.default_rng(seed).normal(0.0, 3.0, VOCAB)
    target = law(logits, Sampling(1, temperature, top_p, "gumbel", top_k, min_p))
    for token in range(VOCAB):
        memory = cluster()
        memory.doubt("a", doubt((10, token, key(0))))
        memory.await_verdict("a", block([token], fixed=token % 2, temperature=temperature))
        learnt = memory.learn("a", verdict(1, [], probs=[float(target[token])]), VOCAB)
        assert learnt == () or token == int(np.argmax(logits))


def test_a_session_is_greedy_once_the_cloud_has_settled_it_so_and_until_it_is_not() -> None:
    memory = cluster()

    def replaced(*, temperature: float | None, status: Literal["settled", "refused"] = "settled") -> bool:
        memory.doubt("a", doubt((10, 1, key(0))))
        memory.await_verdict("a", block([1], temperature=temperature))
        return bool(memory.learn("a", verdict(0, [8], status=status, probs=[0.0]), VOCAB))

    assert not replaced(temperature=None)
    assert not replaced(temperature=0.0, status="refused")
    assert not replaced(temperature=None)
    assert replaced(temperature=0.0)
    assert replaced(temperature=None)
    assert not replaced(temperature=0.8)
    assert not replaced(temperature=None)


def test_what_a_grammar_forced_teaches_nothing_nor_does_a_session_of_unknown_law() -> None:
    memory, forced = cluster(), Grammar(0, "start: /the lie/")

    def learnt(grammar: Grammar | None, *, session: int, temperature: float | None) -> bool:
        memory.doubt("a", doubt((10, 1, key(0)), session=session))
        memory.await_verdict("a", block([1], session=session, temperature=temperature, grammar=grammar))
        return bool(memory.learn("a", verdict(1, [], probs=[1.0], session=session), VOCAB))

    for temperature in (0.0, 0.8):
        assert not learnt(forced, session=7, temperature=temperature)
        assert not learnt(None, session=7, temperature=None), "a later block of the session, without a prime"
    assert not learnt(None, session=8, temperature=None)
    assert learnt(None, session=7, temperature=0.8)
    assert learnt(None, session=7, temperature=None)


def test_two_blocks_of_one_name_and_different_laws_teach_nothing() -> None:
    memory, forced = cluster(), Grammar(0, "start: /the lie/")
    memory.doubt("a", doubt((10, 1, key(0))))
    memory.await_verdict("a", block([1], grammar=forced))
    memory.await_verdict("a", block([1]))
    assert memory.learn("a", verdict(1, [], probs=[1.0]), VOCAB) == ()


def test_a_block_teaches_once_and_only_when_it_is_settled() -> None:
    memory = cluster()
    memory.doubt("a", doubt((10, 1, key(0))))
    assert memory.learn("a", verdict(1, []), VOCAB) == ()
    memory.await_verdict("a", block([1]))
    assert memory.learn("b", verdict(1, []), VOCAB) == ()
    assert memory.learn("a", verdict(0, [], status="unprimed"), VOCAB) == ()
    memory.await_verdict("a", block([1]))
    assert memory.learn("a", verdict(1, []), VOCAB) == (Verified(key(0), 1),)
    assert memory.learn("a", verdict(1, []), VOCAB) == ()
    assert memory.size == memory.waiting == 1


def test_committed_tokens_are_learnt_unless_the_cloud_would_have_said_otherwise() -> None:
    memory = cluster()
    memory.doubt("a", doubt((10, 1, key(0)), (11, 2, key(1)), (12, 3, key(2))))
    memory.await_verdict("a", block([1, 2, 3], fixed=2))
    learnt = memory.learn("a", verdict(3, [9], missed=[True, False]), VOCAB)
    assert learnt == (Verified(key(1), 2), Verified(key(2), 3))


def test_a_rollback_takes_the_doubts_behind_it_along() -> None:
    memory = cluster((key(2), 4))
    memory.doubt("a", doubt((10, 1, key(0)), (12, 4, key(2))))
    memory.await_verdict("a", block([1, 2, 4]))
    memory.learn("a", verdict(0, [9]), VOCAB)
    assert memory.answer("a", block([2, 4], base=11), VOCAB) is None


def test_a_lying_or_garbled_verdict_teaches_nothing_and_breaks_nothing() -> None:
    memory = cluster()
    memory.doubt("a", doubt((10, 1, key(0))))
    memory.await_verdict("a", block([1]))
    assert memory.learn("a", verdict(1, []), 1) == ()
    memory.await_verdict("a", block([1]))
    assert memory.learn("a", verdict(99, [3]), VOCAB) == (Verified(key(0), 1),)


def test_what_neighbours_settled_is_not_passed_on() -> None:
    memory = cluster()
    memory.hear(VerifiedTokens(**HEADER, space="s", items=(Verified(key(0), 7),)))
    assert (memory.size, memory.waiting, memory.take_digest()) == (1, 0, ())


# Bounds


def test_keys_of_another_length_are_counted_and_dropped() -> None:
    memory = cluster()
    memory.doubt("a", doubt((10, 1, b"abc"), (11, 1, key(0))))
    memory.hear(VerifiedTokens(**HEADER, space="s", items=(Verified(b"", 7), Verified(key(0), 1))))
    assert memory.refused_keys == 2
    assert memory.size == 1
    assert memory.answer("a", block([1, 1]), VOCAB) == PeersAnswer(2, "neighbour")


def test_everything_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SESSIONS_MAX", "DOUBTS_MAX", "PENDING_MAX"):
        monkeypatch.setattr(module, name, 3)
    memory = ClusterMemory(5, dims=DIMS)
    for session in range(9):
        memory.doubt("a", doubt(*((p, 1, key(0)) for p in range(9)), session=session))
        memory.await_verdict("a", block([1], session=session))
    assert len(memory._doubts) == len(memory._pending) == 3
    assert [list(d) for d in memory._doubts.values()] == [[6, 7, 8]] * 3
    for position in range(3 * DIGEST_MAX * DIGESTS_MAX):
        memory.doubt("a", doubt((position, 1 + position % 40, key(0))))
        memory.await_verdict("a", block([1 + position % 40], base=position))
        memory.learn("a", verdict(1, [], base=position), VOCAB)
    assert memory.size == 5
    assert memory.waiting == DIGEST_MAX * DIGESTS_MAX
    assert len(memory.take_digest()) == DIGEST_MAX


# Over restarts


def test_verified_tokens_survive_a_restart_and_their_doubts_do_not() -> None:
    memory = cluster((key(0), 7))
    memory.hear(VerifiedTokens(**HEADER, space="s", items=(Verified(key(1), 9),)))
    memory.belong("tokenizer x")
    again = ClusterMemory(64, dims=DIMS)
    again.restore(memory.snapshot())
    again.belong("tokenizer x")
    assert again.size == 2
    assert again.answer("a", block([7]), VOCAB) is None
    again.doubt("a", doubt((10, 7, key(0)), (11, 9, key(1))))
    assert again.answer("a", block([7]), VOCAB) == PeersAnswer(1, "peer")
    assert again.answer("a", block([7, 9]), VOCAB) == PeersAnswer(2, "neighbour")
    again.belong("tokenizer y")
    assert again.size == 0
    again.belong("tokenizer x")
    assert again.size == 0


@given(st.binary(max_size=80))
def test_a_bad_snapshot_is_refused_and_changes_nothing(data: bytes) -> None:
    memory = cluster((key(0), 7))
    for bad in (data, ClusterMemory(4, dims=DIMS + 1).snapshot(), memory.snapshot()[:-1]):
        with pytest.raises(ProtocolError):
            memory.restore(bad)
    assert memory.size == 1


# Limits


def test_doubts_are_bounded_over_all_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One agent that opens session after session would otherwise hold a session's limit in each."""
    monkeypatch.setattr(module, "DOUBTS_TOTAL", 20)
    memory = cluster((key(0), 7))
    for session in range(50):
        memory.doubt("a", doubt(*((p, 7, key(0)) for p in range(session % 7)), session=session))
        assert memory._doubts_held == sum(len(known) for known in memory._doubts.values()) <= 20
    assert memory.answer("a", block([7], base=3, session=48), VOCAB) == PeersAnswer(1, "peer")


def test_blocks_that_wait_for_their_verdict_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING_BYTES", 100)
    memory = ClusterMemory(8, dims=DIMS)
    for base in (*range(40), 39, 3):
        memory.await_verdict("a", block([1] * (base % 9), base=base))
        assert memory._pending_bytes == sum(len(b.ids) for b in memory._pending.values()) <= 100
    memory.learn("a", verdict(0, [], base=3), VOCAB)
    assert memory._pending_bytes == sum(len(b.ids) for b in memory._pending.values())


def test_a_block_with_very_many_doubts_goes_to_the_cloud() -> None:
    """Each doubt costs a search of the whole memory: thousands in one message would hold the edge for seconds."""
    memory = cluster((key(0), 7))
    memory.doubt("a", doubt(*((10 + i, 7, key(0)) for i in range(module.DOUBTFUL_MAX + 1))))
    assert memory.answer("a", block([7] * module.DOUBTFUL_MAX), VOCAB) == PeersAnswer(module.DOUBTFUL_MAX, "peer")
    assert memory.answer("a", block([7] * (module.DOUBTFUL_MAX + 1)), VOCAB) is None


def test_a_neighbour_exactly_as_near_as_asked_for_settles() -> None:
    memory = cluster((key(0), 7))
    memory.doubt("a", doubt((10, 7, key(0))))
    assert memory.answer("a", block([7], similarity=1.0), VOCAB) == PeersAnswer(1, "peer")
    memory = cluster((np.array([100, 75, 0, 0], np.int8).tobytes(), 7))
    memory.doubt("a", doubt((10, 7, key(0))))
    cosine = float(np.float32(100.0) * np.float32(127.0) / (np.float32(125.0) * np.float32(127.0)))
    assert cosine == pytest.approx(0.8)
    found = memory.answer("a", block([7], similarity=cosine), VOCAB)
    assert found == PeersAnswer(1, "peer")
    assert memory.answer("a", block([7], similarity=float(np.nextafter(cosine, 2.0))), VOCAB) is None
