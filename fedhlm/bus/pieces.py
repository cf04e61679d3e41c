"""Splits messages that are larger than the broker accepts; no I/O."""

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from fedhlm.protocol.messages import AnyMessage, EscalationBatch, Output, UncertainTokens, VerdictBatch, VerifiedTokens

Listing = EscalationBatch | VerdictBatch | VerifiedTokens | UncertainTokens


def divided(
    message: AnyMessage, fits: Callable[[AnyMessage], bool], header: Callable[[], dict[str, Any]]
) -> tuple[list[AnyMessage], list[AnyMessage]]:
    """Split a message into parts that fit, in order. Also return the parts that cannot be split and do not fit.

    A message that fits is returned unchanged. Otherwise the first part keeps the header of the message, and `header`
    makes the header of every further part.
    """
    if fits(message):
        return [message], []
    if isinstance(message, Output) and len(message.ids) > 1:
        both = [divided(part, fits, header) for part in _halves(message, header)]
        return both[0][0] + both[1][0], both[0][1] + both[1][1]
    if not isinstance(message, Listing) or len(message.items) < 2:
        return [], [message]
    half = len(message.items) // 2
    parts = replace(message, items=message.items[:half]), replace(message, **header(), items=message.items[half:])
    both = [divided(part, fits, header) for part in parts]
    return both[0][0] + both[1][0], both[0][1] + both[1][1]


def _halves(output: Output, header: Callable[[], dict[str, Any]]) -> tuple[Output, Output]:
    """Split an output at its middle token. Text may come with any of its tokens; the end stays at the end."""
    ids, text = len(output.ids) // 2, len(output.text) // 2
    first = replace(
        output, ids=output.ids[:ids], sources=output.sources[:ids], text=output.text[:text],
        finish=None, error="", statistics={},
    )  # fmt: skip
    rest = replace(
        output, **header(), position=output.position + ids,
        ids=output.ids[ids:], sources=output.sources[ids:], text=output.text[text:],
    )  # fmt: skip
    return first, rest
