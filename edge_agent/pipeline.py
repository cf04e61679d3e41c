"""The pipelines: when to draft and when to send. They distinguish blocking from asynchronous verification."""

from collections.abc import Callable
from typing import Final, NamedTuple


class Pending(NamedTuple):
    """The state that a pipeline decides on: lengths in tokens, age in seconds.

    `uncertainty` is the doubt of the newest draft, 0 to 1. `survival` is the estimated probability that the whole tail
    will be accepted.
    """

    tail: int
    unsent: int
    unsent_age_s: float
    uncertainty: float
    survival: float
    awaiting: bool
    ended: bool


class PipelineRules(NamedTuple):
    """The rules of a pipeline.

    `may_draft` and `must_send` decide by what is pending. `extend` is the number of bonus tokens after a fully accepted
    block. A draft is sent at most `flush_age_s` seconds after it was made. With `grow` a draft is a tree. The cloud's
    own small model is asked for `drafts` tokens before each call.
    """

    may_draft: Callable[[Pending], bool]
    must_send: Callable[[Pending], bool]
    extend: int
    flush_age_s: float = float("inf")
    grow: bool = False
    drafts: int = 0


class PipelineLimits(NamedTuple):
    """The settings of a pipeline.

    `window` is the number of drafts ahead of the last verdict, and `block` the number of drafts per message. A draft
    whose doubt is above `flush_uncertainty`, or that waited `flush_age_s` seconds, sends the block early. Below
    `survival_floor` drafting pauses, and the pending drafts are sent. `bonus` asks for a bonus token after each block.
    `drafts` is the number of tokens that the cloud's own small model drafts before each call of the large one.
    """

    window: int
    block: int
    flush_uncertainty: float
    flush_age_s: float
    survival_floor: float = 0.0
    bonus: bool = True
    drafts: int = 0


def expected_rejection(uncertainty: float) -> float:
    """m(u) = clip(0.82 u - 0.06, 0, 1), the line fitted in U-HLM (arXiv 2412.12687)."""
    return min(1.0, max(0.0, 0.82 * uncertainty - 0.06))


def blocking(limits: PipelineLimits) -> PipelineRules:
    """Draft a block, send it, and wait for its verdict."""
    return PipelineRules(
        may_draft=lambda p: not p.awaiting and p.unsent < limits.block,
        must_send=lambda p: not p.awaiting and p.unsent > 0 and (p.unsent >= limits.block or p.ended),
        extend=int(limits.bonus),
    )


def asynchronous(limits: PipelineLimits) -> PipelineRules:
    """Draft on while verdicts are on their way (docs/algorithms.md, 6)."""
    return PipelineRules(
        may_draft=lambda p: p.tail < limits.window and p.survival >= limits.survival_floor,
        must_send=lambda p: (
            p.unsent > 0
            and (
                p.ended
                or p.unsent >= limits.block
                or p.tail >= limits.window
                or p.uncertainty > limits.flush_uncertainty
                or p.survival < limits.survival_floor
                or p.unsent_age_s >= limits.flush_age_s
            )
        ),
        extend=1,
        flush_age_s=limits.flush_age_s,
    )


def remote(limits: PipelineLimits) -> PipelineRules:
    """Draft nothing. The cloud decodes `block` tokens per request, with `drafts` of its own if it can."""
    return PipelineRules(
        may_draft=lambda _p: False,
        must_send=lambda p: not p.awaiting,
        extend=limits.block,
        drafts=limits.drafts,
    )


def tree(_limits: PipelineLimits) -> PipelineRules:
    """Grow a tree, send it, and wait for its verdict (docs/algorithms.md, 6.1).

    The tree's own limits end its growth.
    """
    return PipelineRules(
        may_draft=lambda p: not p.awaiting and p.unsent == 0,
        must_send=lambda p: not p.awaiting and p.unsent > 0,
        extend=1,
        grow=True,
    )


PIPELINES: Final[dict[str, Callable[[PipelineLimits], PipelineRules]]] = {
    "blocking": blocking,
    "async": asynchronous,
    "remote": remote,
    "tree": tree,
}
