"""Admission: hostile and late escalations are refused with the reason, and sessions are bounded."""

from unittest.mock import Mock

import msgspec
import pytest
from msgspec.structs import replace

from cloud_verifier import sessions as sessions_module
from cloud_verifier.sessions import EXTEND_MAX, Admission, Key, RefusedBlock, Sessions, StaleBlock, UnprimedBlock
from cloud_verifier.verifier import Block
from fedhlm.decoding.grammar import Constraint
from fedhlm.decoding.tree import Branch, pack_branches
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Fingerprint, Grammar, Hints, Prime, Sampling
from fedhlm.protocol.packing import pack_ids, unpack_ids
from fedhlm_lab.sim import toy

KEY = Key("c", "a", 1)


def store(sessions_max: int = 4) -> Sessions:
    return Sessions(
        fingerprint=toy.FINGERPRINT, eos_ids=frozenset({0}), context_max=toy.CONTEXT, sessions_max=sessions_max
    )


def escalation(
    base: int = 2,
    ids: bytes = pack_ids([5, 6], toy.VOCAB_SIZE),
    *,
    epoch: int = 0,
    primed: bool = True,
    fixed: int = 0,
    extend: int = 1,
    coupling: str = "gumbel",
    laws: bytes = b"",
    fingerprint: Fingerprint = toy.FINGERPRINT,
    context: bytes | None = None,
    branches: bytes = b"",
) -> Escalation:
    prime = None
    if primed:
        held = pack_ids(list(range(1, base + 1)), toy.VOCAB_SIZE) if context is None else context
        prime = Prime(Sampling(seed=1, coupling=coupling), fingerprint, held)
    return Escalation(
        version=SCHEMA_VERSION, sender="a", sequence=1, sent_ms=0, session=1, epoch=epoch, base=base, ids=ids, patience_ms=10,
        fixed=fixed, extend=extend, before=prime, laws=laws, hints=Hints(branches=branches) if branches else None,
    )  # fmt: skip


def deep(count: int) -> bytes:
    """A branch of `count` nodes below the two drafts."""
    return pack_branches([Branch(2 + i, 5) for i in range(count)], toy.VOCAB_SIZE)


def test_branches_belong_to_the_drafts_and_not_to_the_fixed_ids() -> None:
    branches = (Branch(0, 7), Branch(1, 8), Branch(3, 9))
    packed = pack_branches(branches, toy.VOCAB_SIZE)
    for coupling in ("gumbel", "greedy"):
        admitted = store().admit(KEY, escalation(fixed=1, branches=packed, coupling=coupling))
        assert admitted == Block(2, [5, 6], 1, 1, [b"", b""], branches)
    refused = store().admit(KEY, escalation(fixed=2, branches=packed))
    assert isinstance(refused, RefusedBlock)
    assert "parent of branch 2 must be at most 2 (got 3)" in refused.reason


def test_the_longest_branch_may_just_fill_the_context() -> None:
    assert isinstance(store().admit(KEY, escalation(branches=deep(toy.CONTEXT - 5))), Block)


def test_a_primed_block_is_admitted() -> None:
    assert store().admit(KEY, escalation()) == Block(2, [5, 6], 0, 1, [b"", b""])


def test_an_unknown_session_asks_for_its_prime() -> None:
    assert store().admit(KEY, escalation(primed=False)) == UnprimedBlock()


def test_a_block_beyond_what_is_held_asks_for_its_prime() -> None:
    sessions = store()
    sessions.admit(KEY, escalation())
    assert sessions.admit(KEY, escalation(base=3, primed=False)) == UnprimedBlock()


def test_older_epochs_are_stale() -> None:
    sessions = store()
    sessions.admit(KEY, escalation(epoch=2))
    assert sessions.admit(KEY, escalation(epoch=1)) == StaleBlock()


def test_blocks_behind_a_rejection_of_their_epoch_are_stale() -> None:
    """Without this an answer to a later block could overtake the rejection and confirm discarded drafts."""
    sessions = store()
    sessions.admit(KEY, escalation())
    entry = sessions.entry(KEY)
    assert entry is not None
    entry.state.context += [5, 7]
    entry.state.rejected_at = 3
    assert sessions.admit(KEY, escalation(base=4, primed=False)) == StaleBlock()
    # Behind the context too: that is no lost session, and nobody waits for the answer.
    assert sessions.admit(KEY, escalation(base=9, primed=False)) == StaleBlock()
    assert isinstance(sessions.admit(KEY, escalation(base=4, primed=False, epoch=1)), Block)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (escalation(ids=b"\1"), "multiple of 2"),
        (escalation(ids=b"\xff\xff"), "(got 65535)"),
        (escalation(fixed=3), "escalation.fixed must be at most the 2 ids"),
        (escalation(base=0, context=b""), "escalation.base must be"),
        (escalation(ids=b"", extend=0), "nothing is asked"),
        (escalation(extend=toy.CONTEXT), "context is 512"),
        (escalation(coupling="magic"), "sampling.coupling must be one of"),
        (escalation(coupling="full", laws=b"abc"), "escalation.laws must be one law for each of 2 drafts (got 3 bytes"),
        (escalation(branches=b"abc"), "branches must be a multiple of 4 bytes"),
        (escalation(branches=pack_branches([Branch(3, 1)], 48)), "parent of branch 0 must be at most 2"),
        (escalation(branches=pack_branches([Branch(0, 49)], 99)), "token id must be below 48 (got 49)"),
        (escalation(branches=pack_branches([Branch(0, 1)], 48), coupling="full", laws=bytes(192)), "1 branches"),
        (escalation(branches=deep(toy.CONTEXT - 4)), "reaches position 513"),
        (escalation(context=b"\1\0"), "prime.context has 1 ids"),
        (escalation(fingerprint=Fingerprint("other", 48, toy.FINGERPRINT.noise, "m")), "fingerprint.tokenizer differs"),
        (escalation(fingerprint=Fingerprint("toy", 49, toy.FINGERPRINT.noise, "m")), "fingerprint.vocab_size differs"),
        (escalation(fingerprint=Fingerprint("toy", 48, "dice", "m")), "fingerprint.noise differs"),
    ],
)
def test_bad_escalations_are_refused_with_the_reason(bad: Escalation, reason: str) -> None:
    refused: Admission = store().admit(KEY, bad)
    assert isinstance(refused, RefusedBlock)
    assert reason in refused.reason


def test_the_end_of_a_session_is_not_answered_and_leaves_nothing() -> None:
    sessions = store()
    end = escalation(base=0, ids=b"", extend=0, primed=False, epoch=1)
    assert sessions.admit(KEY, end) == StaleBlock()
    assert isinstance(sessions.admit(KEY, escalation()), Block)
    assert len(sessions) == 1
    assert sessions.admit(KEY, end) == StaleBlock()
    assert (len(sessions), sessions._keys_of) == (0, {})


def test_sessions_are_bounded_and_the_oldest_goes_first() -> None:
    sessions = store(sessions_max=2)
    for number in range(4):
        sessions.admit(KEY._replace(session=number), escalation())
        sessions.entry(KEY._replace(session=0))
    assert len(sessions) == 2
    assert sessions.evicted == 2
    assert sessions.entry(KEY._replace(session=0)) is not None


def test_a_prime_repairs_a_context_that_went_another_way() -> None:
    sessions = store()
    sessions.admit(KEY, escalation())
    entry = sessions.entry(KEY)
    assert entry is not None
    entry.state.context += [40, 41, 42]
    sessions.admit(KEY, msgspec.structs.replace(escalation(base=4), epoch=1))
    assert entry.state.context == [1, 2, 3, 4]


def test_a_coupling_without_a_name_is_refused() -> None:
    """It would otherwise be taken for a session that is not known yet, and fail when the first draft is settled."""
    refused = store().admit(KEY, escalation(coupling=""))
    assert isinstance(refused, RefusedBlock)
    assert "sampling.coupling must be one of" in refused.reason


def test_an_answer_goes_on_for_a_limited_number_of_tokens() -> None:
    admitted = store().admit(KEY, escalation(extend=EXTEND_MAX + 1))
    assert isinstance(admitted, Block)
    assert admitted.extend == EXTEND_MAX


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (escalation(ids=b"\1\0" * 190_000), "reaches position 190002"),
        (escalation(context=b"\1\0" * 130_000), "prime.context has 130000 ids"),
    ],
    ids=["ids", "context"],
)
def test_what_is_too_long_is_refused_before_it_is_unpacked(
    given: Escalation, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpacked(data: bytes, vocab_size: int) -> list[int]:
        assert len(data) < 1_000
        return unpack_ids(data, vocab_size)

    monkeypatch.setattr(sessions_module, "unpack_ids", unpacked)
    refused = store().admit(KEY, given)
    assert isinstance(refused, RefusedBlock)
    assert reason in refused.reason


def test_an_agent_that_opens_session_after_session_drives_out_its_own() -> None:
    sessions = store(sessions_max=8)
    modest = [Key("c", f"m{number}", 1) for number in range(3)]
    for key in modest:
        sessions.admit(key, escalation())
    for number in range(100):
        sessions.admit(Key("c", "greedy", number), escalation())
        assert len(sessions) <= 8
        assert sum(map(len, sessions._keys_of.values())) == len(sessions)
    assert all(sessions.entry(key) is not None for key in modest)
    assert sessions.entry(Key("c", "greedy", 99)) is not None
    for key in modest:
        sessions.forget(key)
    assert {owner: len(keys) for owner, keys in sessions._keys_of.items()} == {("c", "greedy"): 5}


def test_sessions_are_bounded_in_bytes_and_a_greedy_agent_loses_its_own() -> None:
    sessions = Sessions(
        fingerprint=toy.FINGERPRINT,
        eos_ids=frozenset({0}),
        context_max=toy.CONTEXT,
        sessions_max=1_000,
        sessions_bytes=100 * sessions_module.TOKEN_BYTES,
    )
    for number in range(3):
        assert isinstance(sessions.admit(Key("c", "modest", number), escalation(base=10)), Block)
    for number in range(200):
        assert isinstance(sessions.admit(Key("c", "greedy", number), escalation(base=20)), Block)
        assert sessions.context_bytes <= sessions.sessions_bytes
    assert [key.session for key in sessions._entries if key.agent == "modest"] == [0, 1, 2]
    assert sessions.evicted > 190
    for key in list(sessions._entries):
        sessions.forget(key)
    assert sessions.context_bytes == 0


def test_a_grammar_counts_with_what_it_takes() -> None:
    sessions = Sessions(
        fingerprint=toy.FINGERPRINT,
        eos_ids=frozenset({0}),
        context_max=toy.CONTEXT,
        sessions_max=1_000,
        sessions_bytes=5 * sessions_module.GRAMMAR_TOKENS * sessions_module.TOKEN_BYTES,
        constrain=lambda _grammar: Mock(spec=Constraint),
    )
    asked = escalation()
    assert isinstance(asked.before, Prime)
    held = replace(asked, before=replace(asked.before, sampling=Sampling(1, grammar=Grammar(2, "start: /a/"))))
    for number in range(50):
        assert isinstance(sessions.admit(Key("c", "a", number), held), Block)
    assert len(sessions) < 5
    assert sessions.context_bytes <= sessions.sessions_bytes


def test_a_context_that_grew_counts_with_what_it_has() -> None:
    sessions = store()
    sessions.admit(KEY, escalation())
    entry = sessions.entry(KEY)
    assert entry is not None
    entry.state.context += [5] * 40
    sessions.admit(KEY, escalation(primed=False))
    assert sessions.context_bytes == 42 * sessions_module.TOKEN_BYTES


def with_caches(held: Sessions, agent: str, count: int) -> None:
    """Sessions of an agent whose caches hold their contexts."""
    for number in range(count):
        key = Key("c", agent, number)
        held.admit(key, escalation(context=pack_ids([7, number % 9 + 1], toy.VOCAB_SIZE)))
        entry = held.entry(key)
        assert entry is not None
        entry.cache, entry.cached = f"{agent}{number}", 2
        entry.state.fed = list(entry.state.context)


def test_a_new_session_goes_on_with_a_cache_however_many_sessions_there_are() -> None:
    """Only a few are looked at: those that the same agent used last."""
    held = store(sessions_max=20_000)
    for number in range(100):
        with_caches(held, f"other{number}", 100)
    with_caches(held, "a", 1_000)
    new = Key("c", "a", 5_000)
    held.admit(new, escalation(context=pack_ids([7, 999 % 9 + 1], toy.VOCAB_SIZE)))
    entry = held.entry(new)
    assert entry is not None
    looked: list[Key] = []

    class Noting(set[Key]):
        def __contains__(self, key: object) -> bool:
            assert isinstance(key, Key)
            looked.append(key)
            return False

    held.inherit(new, entry, Noting())
    assert (entry.cache, entry.cached) == ("a999", 2)
    assert len(looked) <= 16
    assert {key.agent for key in looked} == {"a"}


def test_the_books_about_owners_end_with_their_sessions() -> None:
    held = store(sessions_max=8)
    for number in range(100):
        with_caches(held, f"agent{number}", 5)
    assert len(held) == 8
    assert sum(map(len, held._keys_of.values())) == 8
    assert set(held._keys_of) == set(held._tokens_of) == {key.owner for key in held._entries}
    for key in [*held._entries]:
        held.forget(key)
    assert not held._keys_of
    assert not held._tokens_of
    assert held.context_bytes == 0
