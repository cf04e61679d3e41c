"""Settles one block of drafts: a pure acceptance test on the target's logits.

`settle` is a generator. It yields the ids to feed and receives their logits, so it knows nothing of models, threads or
batches, and any number of blocks can be driven in lockstep. A token that was settled once is never decided again.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.partial import settle_told
from fedhlm.decoding.couplings import COUPLINGS, Coupling
from fedhlm.decoding.grammar import Constraint
from fedhlm.decoding.ids import common_prefix
from fedhlm.decoding.sampling import law
from fedhlm.decoding.tree import Branch, Tree
from fedhlm.protocol.messages import Sampling


@dataclass
class Session:
    """The cloud's state of one generation: the sampling parameters and the context settled so far, prompt included.

    `told` is as in `Engine`. `approximate` counts the tokens that were settled and are not certain to be the target's.
    """

    sampling: Sampling
    vocab_size: int
    eos_ids: frozenset[int]
    context: list[int]
    epoch: int = 0
    rejected_at: int | None = None  # this epoch's first rejection; later blocks follow a discarded prefix
    fed: list[int] = field(default_factory=list)  # ids whose keys and values are in the cache
    fed_small: list[int] = field(default_factory=list)  # the same of the cloud's own small model
    held: Constraint | None = None  # the text under the grammar of the sampling
    told: int = 0
    approximate: int = 0

    def draw(self, coupling: Coupling, row: NDArray[Any], position: int, draft: int | None, law: bytes) -> int:
        """Settle a position, and count it if it is not certain."""
        drawn = settle_told(coupling, row, self.sampling, position, draft, law, told=self.told)
        self.approximate += not drawn.certain
        return drawn.token


class Block(NamedTuple):
    """The content of an escalation, decoded and checked.

    `laws` has one entry per id, which is empty if no law was sent. `branches` are the drafts' alternatives; only shared
    couplings have them. The cloud's own small model drafts `drafts` tokens before each call for bonus tokens.
    """

    base: int
    ids: list[int]
    fixed: int
    extend: int
    laws: list[bytes]
    branches: tuple[Branch, ...] = ()
    drafts: int = 0


class Feed(NamedTuple):
    """A request to the model, or to the cloud's own `small` one.

    Keep the first `keep` cached positions, append `ids`, and return the logits of the last `rows` ids, shape (rows, V).
    """

    keep: int
    ids: list[int]
    rows: int
    small: bool = False


class Settled(NamedTuple):
    """The result of a block: the first `accepted` ids are accepted, and `ids` follow them.

    `target_probs` are the target probabilities of all ids that were evaluated. `missed` tells for each fixed id whether
    the target would have emitted another token there. Only a shared coupling can tell; under any other it is false.
    `approximate` is how many of the tokens that the target settled are not certain to be its own (`Engine.told`).
    `guesses` has for each block of the cloud's own drafts how many there were, and how many were accepted.
    """

    accepted: int
    ids: list[int]
    target_probs: list[float]
    missed: list[bool]
    approximate: int = 0
    guesses: tuple[tuple[int, int], ...] = ()


def settle(
    session: Session, block: Block, watch: Callable[[NDArray[Any]], object] | None = None
) -> Generator[Feed, NDArray[Any], Settled]:
    """Settle a block whose base is at most the length of the session's context (docs/algorithms.md, 2 and 6).

    Fixed ids are the device's decision and overwrite the context. A draft is tested by the session's coupling, and
    nothing of the main chain after the first rejection is evaluated. If the emitted token is a branch of the tree, it
    is accepted, and settling continues on the main path below it (docs/algorithms.md, 6.1).

    One model call serves the main chain, and each change of path needs one more. Nodes off the emitted text are never
    evaluated, and there is still only one round trip. A path that is accepted to its end is extended by `block.extend`
    bonus tokens, or up to the end of the text. With `block.drafts` the small model drafts ahead of them, and one call
    of the large one then settles several (speculative decoding). A draft is accepted iff it is the token that the
    target emits, so the ids are the same with and without. `watch` receives the logits of each new bonus token, (V,).
    """
    context, base, fixed, uncertain = session.context, block.base, block.fixed, session.approximate
    coupling = COUPLINGS[session.sampling.coupling]
    _overwrite(context, base, block.ids[:fixed])
    tree = Tree(block.ids[fixed:], block.branches)
    rows = yield from _run(session, base, block.ids)
    accepted = _stand(session, block, coupling, rows)
    looked_at = list(zip(rows, block.ids[: accepted + 1], strict=False))
    probs = [float(law(row, session.sampling)[token]) for row, token in looked_at]
    missed = [
        coupling.shared and token != coupling.settle(row, session.sampling, position, None, b"")
        for position, (row, token) in enumerate(looked_at[:fixed], start=base)
    ]
    start = end = base + accepted  # tokens before `end` are settled by the device or the target
    stood = accepted == len(block.ids)
    node = accepted - fixed
    if not stood:
        session.rejected_at = start
    while not stood:
        del session.fed[end:]
        child = tree.child(node, context[end])
        end += 1
        if child is None or context[end - 1] in session.eos_ids:
            return Settled(accepted, context[start:end], probs, missed, session.approximate - uncertain)
        path = tree.chain_below(child)
        ids = [tree.tokens[n - 1] for n in path]
        rows = yield from _run(session, end, ids)
        count = _stand(session, Block(end, ids, 0, 0, [b""] * len(ids)), coupling, rows)
        stood = count == len(ids)
        node = path[count - 1] if count else child
        end += count
    drafts: list[int] = []
    guesses: list[tuple[int, int]] = []
    rows, leaf = rows[-1:], end
    for position in range(leaf, leaf + block.extend):
        if position == len(context):
            if position > leaf:
                drafts = yield from _drafts(session, coupling, min(block.drafts, leaf + block.extend - position - 1))
                rows = yield from _run(session, position, drafts)
            for row, guess in zip(rows, [*drafts, None], strict=True):
                if watch is not None:
                    watch(row)
                context.append(session.draw(coupling, row, len(context), None, b""))
                if context[-1] != guess or guess in session.eos_ids:
                    break
            if drafts:
                guesses.append((len(drafts), common_prefix(drafts, context[position:])))
        end = position + 1
        if context[position] in session.eos_ids:
            break
    return Settled(accepted, context[start:end], probs, missed, session.approximate - uncertain, tuple(guesses))


def _drafts(session: Session, coupling: Coupling, count: int) -> Generator[Feed, NDArray[Any], list[int]]:
    """Draft up to `count` tokens after the context with the small model, up to the end of the text."""
    drafts: list[int] = []
    while len(drafts) < count and not session.eos_ids.intersection(drafts):
        text = session.context + drafts
        keep = min(common_prefix(session.fed_small, text), len(text) - 1)
        session.fed_small = text
        (row,) = yield Feed(keep, text[keep:], 1, small=True)
        if session.held is not None:
            row = session.held.masked(row, text)
        drafts.append(coupling.draft(row, session.sampling, len(text)).token)
    return drafts


def _overwrite(context: list[int], base: int, fixed: list[int]) -> None:
    for position, token in enumerate(fixed, start=base):
        if position < len(context) and context[position] != token:
            del context[position:]
            return


def _run(session: Session, start: int, ids: list[int]) -> Generator[Feed, NDArray[Any], NDArray[Any]]:
    """The logits after the context before `start` and after each of `ids`, under the grammar; (len(ids) + 1, V)."""
    rows = yield _feed(session, start, ids)
    if session.held is None:
        return rows
    before = session.context[:start]
    return np.stack([session.held.masked(row, before + ids[:i]) for i, row in enumerate(rows)])


def _stand(session: Session, block: Block, coupling: Coupling, rows: NDArray[Any]) -> int:
    """Return how many leading ids are accepted.

    Afterwards the context holds them and, if one was rejected, the target's token after them.
    """
    for i, token in enumerate(block.ids):
        position = block.base + i
        if position == len(session.context):
            settled = token if i < block.fixed else session.draw(coupling, rows[i], position, token, block.laws[i])
            session.context.append(settled)
        if session.context[position] != token:
            return i
    return len(block.ids)


def _feed(session: Session, base: int, ids: list[int]) -> Feed:
    keep = min(common_prefix(session.fed, session.context), base - 1)
    new = session.context[keep:base] + ids
    session.fed = session.context[:keep] + new
    return Feed(keep, new, len(ids) + 1)
