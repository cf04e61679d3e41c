"""Messages that a broker does not take whole, divided where that can be; no I/O."""

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from fedhlm.protocol.messages import AnyMessage, EscalationBatch, UncertainTokens, VerdictBatch, VerifiedTokens

Listing = EscalationBatch | VerdictBatch | VerifiedTokens | UncertainTokens


def divided(
    message: AnyMessage, fits: Callable[[AnyMessage], bool], header: Callable[[], dict[str, Any]]
) -> tuple[list[AnyMessage], list[AnyMessage]]:
    """What may travel, in order, and what cannot because one item alone is too large.

    A message that fits is left as it is. Of the others the first half keeps its header; `header` makes one for every other part.
    """
    if fits(message):
        return [message], []
    if not isinstance(message, Listing) or len(message.items) < 2:
        return [], [message]
    half = len(message.items) // 2
    parts = replace(message, items=message.items[:half]), replace(message, **header(), items=message.items[half:])
    both = [divided(part, fits, header) for part in parts]
    return both[0][0] + both[1][0], both[0][1] + both[1][1]
