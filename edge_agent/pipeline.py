"""When to draft on and when to send: the choices that tell blocking from asynchronous verification."""

from collections.abc import Callable
from typing import Final, NamedTuple


class Pending(NamedTuple):
    """What a pipeline decides on: lengths in tokens, the age in seconds, uncertainty of the newest draft in [0, 1],
    and the estimated probability that the whole tail stands."""

    tail: int
    unsent: int
    unsent_age_s: float
    uncertainty: float
    survival: float
    awaiting: bool
    ended: bool


class PipelineRules(NamedTuple):
    """`may_draft` and `must_send` look at what is pending; `extend` is how many tokens of its own the cloud adds to a
    fully accepted block; a draft is sent at the latest `flush_age_s` after it was made. With `grow` a draft is a tree."""

    may_draft: Callable[[Pending], bool]
    must_send: Callable[[Pending], bool]
    extend: int
    flush_age_s: float = float("inf")
    grow: bool = False


class PipelineLimits(NamedTuple):
    """Window: drafts ahead of the last verdict. Block: drafts per message. A draft above `flush_uncertainty`, or one
    that waited `flush_age_s`, sends the block early. Below `survival_floor` drafting pauses, and what is there is sent.
    `bonus` asks for a token of the LLM's own after each block."""

    window: int
    block: int
    flush_uncertainty: float
    flush_age_s: float
    survival_floor: float = 0.0
    bonus: bool = True


def expected_rejection(uncertainty: float) -> float:
    """m(u) = clip(0.82 u - 0.06), the line that U-HLM (arXiv 2412.12687) fitted; in [0, 1]."""
    return min(1.0, max(0.0, 0.82 * uncertainty - 0.06))


def blocking(limits: PipelineLimits) -> PipelineRules:
    """Draft a block, send it, wait for its verdict."""
    return PipelineRules(
        may_draft=lambda p: not p.awaiting and p.unsent < limits.block,
        must_send=lambda p: not p.awaiting and p.unsent > 0 and (p.unsent >= limits.block or p.ended),
        extend=int(limits.bonus),
    )


def asynchronous(limits: PipelineLimits) -> PipelineRules:
    """Draft on while verdicts are under way (docs/algorithms.md, 6)."""
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
    """Draft nothing: the cloud decodes `block` tokens at each request."""
    return PipelineRules(
        may_draft=lambda _p: False,
        must_send=lambda p: not p.awaiting,
        extend=limits.block,
    )


def tree(_limits: PipelineLimits) -> PipelineRules:
    """Grow a tree, send it, wait for its verdict (docs/algorithms.md, 6.1). The tree's own limits end its growth."""
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
