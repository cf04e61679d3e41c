"""Turns outcomes of blocks into verdicts, and groups verdicts into messages of bounded size. No I/O."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, assert_never

import numpy as np

from cloud_verifier.batching import Outcome
from cloud_verifier.sessions import RefusedBlock, StaleBlock, UnprimedBlock
from cloud_verifier.verifier import Settled
from fedhlm.protocol.fields import MAX_BATCH, MAX_PAYLOAD_BYTES
from fedhlm.protocol.messages import Escalation, RoutedVerdict, Verdict
from fedhlm.protocol.packing import pack_bits, pack_ids, pack_probs
from fedhlm.protocol.refusing import refused

ANSWER_BYTES: Final = MAX_PAYLOAD_BYTES // 4  # most bytes of verdicts in one message
MODEL_FAILED: Final = "the cloud's model failed"  # how the reason of such a refusal begins

APPROXIMATE: Final = "{} of the tokens are not certain to be the LLM's own: its server tells only the likeliest ones"


def verdict_of(
    escalation: Escalation, outcome: Outcome, header: Callable[[], dict[str, Any]], *, vocab_size: int
) -> Verdict | None:
    """The verdict on a block; None if nobody waits for one.

    `header` creates the header fields of a message.
    """
    about: dict[str, Any] = {"session": escalation.session, "epoch": escalation.epoch, "base": escalation.base}
    match outcome:
        case Settled(accepted, ids, probs, missed, approximate, _):
            return Verdict(
                **header(),
                **about,
                status="settled",
                accepted=accepted,
                ids=pack_ids(ids, vocab_size),
                target_probs=pack_probs(np.clip(probs, 0.0, 1.0)),
                missed=pack_bits(missed),
                reason=APPROXIMATE.format(approximate) if approximate else "",
            )
        case UnprimedBlock():
            return Verdict(**header(), **about, status="unprimed")
        case RefusedBlock(reason):
            return refused(header(), escalation, reason)
        case StaleBlock():
            return None
        case _:
            assert_never(outcome)


def portions(answers: Sequence[RoutedVerdict]) -> Iterator[tuple[RoutedVerdict, ...]]:
    """Group the answers, in order, so that each group fits one message.

    An answer that is too large by itself goes alone.
    """
    portion: list[RoutedVerdict] = []
    size = 0
    for answer in answers:
        new = len(answer.verdict.ids) + len(answer.verdict.target_probs)
        if portion and (len(portion) == MAX_BATCH or size + new > ANSWER_BYTES):
            yield tuple(portion)
            portion, size = [], 0
        portion.append(answer)
        size += new
    if portion:
        yield tuple(portion)
