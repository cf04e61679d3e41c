"""Settling one block of drafts: pure acceptance over the target's logits.

`settle` is a generator: it yields the ids to feed and receives their logits, so it knows nothing of models, threads or
batches, and any number of blocks can be driven in lockstep. What was settled once is never decided again.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from fedhlm.ids import common_prefix
from fedhlm.messages import Sampling
from fedhlm.sampling import COUPLINGS, law


@dataclass
class Session:
    """What the cloud holds of one generation: the law and the context settled so far (prompt included)."""

    sampling: Sampling
    vocab_size: int
    eos_ids: frozenset[int]
    context: list[int]
    epoch: int = 0
    rejected_at: int | None = None  # where this epoch's drafts failed: later blocks of it follow a discarded prefix
    fed: list[int] = field(default_factory=list)  # ids whose keys and values are in the cache


class Block(NamedTuple):
    """An escalation's content, decoded and checked: `laws` has one entry per id, empty where none travels."""

    base: int
    ids: list[int]
    fixed: int
    extend: int
    laws: list[bytes]


class Feed(NamedTuple):
    """Keep the first `keep` cached positions, append `ids`, and give back their logits, shape (len(ids), V)."""

    keep: int
    ids: list[int]


class Settled(NamedTuple):
    """The leading `accepted` ids stand; `ids` follow them; target probability of every id that was looked at."""

    accepted: int
    ids: list[int]
    target_probs: list[float]


def settle(session: Session, block: Block) -> Generator[Feed, NDArray[Any], Settled]:
    """Settle a block whose base is at most the session's context (ALGORITHMS 2 and 6).

    Fixed ids are the device's authority and overwrite; a draft is tested by the session's coupling; after the first
    rejection nothing further is looked at. A fully accepted block is extended by `block.extend` tokens of the target,
    or up to its end of text.
    """
    context = session.context
    base, ids = block.base, block.ids
    coupling = COUPLINGS[session.sampling.coupling]
    for position, token in enumerate(ids[: block.fixed], start=base):
        if position < len(context) and context[position] != token:
            del context[position:]
            break
    logits = yield _feed(session, base, ids)
    offset = len(logits) - len(ids) - 1  # the row before base holds the law of the first id
    probs: list[float] = []
    for i, token in enumerate(ids):
        position = base + i
        row = logits[offset + i]
        probs.append(float(law(row, session.sampling)[token]))
        if position < len(context):
            settled = context[position]
        else:
            settled = (
                token if i < block.fixed else coupling.settle(row, session.sampling, position, token, block.laws[i])
            )
            context.append(settled)
        if settled != token:
            del session.fed[position:]
            session.rejected_at = position
            return Settled(i, [settled], probs)
    extension: list[int] = []
    row = logits[-1]
    for position in range(base + len(ids), base + len(ids) + block.extend):
        if position == len(context):
            if position > base + len(ids):
                row = (yield _feed(session, position, []))[-1]
            context.append(coupling.settle(row, session.sampling, position, None, b""))
        extension.append(context[position])
        if context[position] in session.eos_ids:
            break
    return Settled(len(ids), extension, probs)


def _feed(session: Session, base: int, ids: list[int]) -> Feed:
    keep = min(common_prefix(session.fed, session.context), base - 1)
    new = session.context[keep:base] + ids
    session.fed = session.context[:keep] + new
    return Feed(keep, new)
