"""An outcome becomes one verdict that says it whole; verdicts travel in order, in messages of bounded size."""

from itertools import count, pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cloud_verifier import verdicts
from cloud_verifier.sessions import RefusedBlock, StaleBlock, UnprimedBlock
from cloud_verifier.verdicts import portions, verdict_of
from cloud_verifier.verifier import Settled
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.fields import MAX_BATCH, MAX_REASON
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, RoutedVerdict, Verdict, VerdictBatch
from fedhlm.protocol.packing import unpack_bits, unpack_ids, unpack_probs

VOCAB_SIZE = 4_096
BLOCK = Escalation(
    version=SCHEMA_VERSION, sender="a", sequence=1, sent_ms=0, session=9, epoch=3, base=17, ids=b"", patience_ms=1
)


class Header:
    """Counts the headers that it makes."""

    def __init__(self) -> None:
        self.made = count()

    def __call__(self) -> dict[str, Any]:
        return {"version": SCHEMA_VERSION, "sender": "cloud", "sequence": next(self.made), "sent_ms": 0}


@given(
    accepted=st.integers(0, 40),
    ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=20),
    probs=st.lists(st.floats(-1e-9, 1.0 + 1e-9), max_size=40),
    missed=st.lists(st.booleans(), max_size=20),
)
def test_a_verdict_says_all_that_was_settled(
    accepted: int, ids: list[int], probs: list[float], missed: list[bool]
) -> None:
    verdict = verdict_of(BLOCK, Settled(accepted, ids, probs, missed), Header(), vocab_size=VOCAB_SIZE)
    assert verdict is not None
    assert (verdict.session, verdict.epoch, verdict.base) == (9, 3, 17)
    assert (verdict.status, verdict.source, verdict.accepted) == ("settled", "cloud", accepted)
    assert unpack_ids(verdict.ids, VOCAB_SIZE) == ids
    assert max((abs(a - b) for a, b in zip(unpack_probs(verdict.target_probs), probs, strict=True)), default=0) < 1e-3
    assert unpack_bits(verdict.missed, len(missed)) == missed
    assert decode(encode(verdict)) == verdict


def test_what_is_not_settled_says_why_and_what_is_stale_takes_no_header() -> None:
    header = Header()
    told = [
        verdict_of(BLOCK, outcome, header, vocab_size=VOCAB_SIZE)
        for outcome in (UnprimedBlock(), StaleBlock(), RefusedBlock("x" * 5_000))
    ]
    assert [verdict and verdict.status for verdict in told] == ["unprimed", None, "refused"]
    assert next(header.made) == 2
    assert told[2] is not None
    assert decode(encode(told[2])) == told[2]
    assert told[2].reason == "x" * MAX_REASON


@given(sizes=st.lists(st.sampled_from((0, 2, 60_000, verdicts.ANSWER_BYTES - 2)), max_size=12), many=st.booleans())
def test_portions_hold_every_answer_once_in_order_and_keep_their_size(sizes: list[int], many: bool) -> None:
    sizes = sizes + [0] * (MAX_BATCH + 3) * many
    answers = [RoutedVerdict(f"a{i}", _verdict(size)) for i, size in enumerate(sizes)]
    parts = list(portions(answers))
    assert [answer for part in parts for answer in part] == answers
    for part in parts:
        assert 1 <= len(part) <= MAX_BATCH
        assert len(part) == 1 or sum(_size(answer) for answer in part) <= verdicts.ANSWER_BYTES
    for part, following in pairwise(parts):  # no message more than needed
        assert len(part) == MAX_BATCH or sum(map(_size, part)) + _size(following[0]) > verdicts.ANSWER_BYTES
    if parts and max(sizes) <= 60_000:
        batch = VerdictBatch(**Header()(), items=parts[0])
        assert decode(encode(batch)) == batch


def _verdict(size: int) -> Verdict:
    return Verdict(
        **Header()(),
        session=1,
        epoch=0,
        base=1,
        status="settled",
        ids=bytes(min(size, 60_000)),
        target_probs=bytes(max(0, size - 60_000)),
    )


def _size(answer: RoutedVerdict) -> int:
    return len(answer.verdict.ids) + len(answer.verdict.target_probs)
