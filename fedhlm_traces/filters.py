"""Subscription filters that do not overlap.

A broker may deliver a message once for every filter that matches it.
"""

from collections.abc import Sequence

from fedhlm.bus.interface import check_filter
from fedhlm.errors import TraceError


def distinct(filters: Sequence[str]) -> tuple[str, ...]:
    """Drop filters that another one covers, and keep the order.

    Raises:
        TraceError: a malformed filter, or two of which neither covers the other though some topic falls under both.
    """
    for pattern in filters:
        try:
            check_filter(pattern)
        except ValueError as exc:
            raise TraceError(str(exc)) from exc
    different = tuple(dict.fromkeys(filters))
    kept = tuple(f for f in different if not any(g != f and _covers(_levels(g), _levels(f)) for g in different))
    for number, one in enumerate(kept):
        for other in kept[:number]:
            if _overlap(_levels(other), _levels(one)):
                raise TraceError(f"filters {other!r} and {one!r} overlap: messages under both would be recorded twice")
    return kept


def _levels(pattern: str) -> list[str]:
    return pattern.split("/")


def _covers(wide: list[str], narrow: list[str]) -> bool:
    """Whether `wide` matches every topic of `narrow`; a leading wildcard does not match `$` topics."""
    if narrow[0].startswith("$") and wide[0] in ("+", "#"):
        return False
    for i, level in enumerate(wide):
        if level == "#":
            return True
        if i >= len(narrow) or narrow[i] == "#" or level not in ("+", narrow[i]):
            return False
    return len(wide) == len(narrow)


def _overlap(a: list[str], b: list[str]) -> bool:
    """Whether some topic matches both filters."""
    heads = {a[0], b[0]}
    if heads & {"+", "#"} and any(head.startswith("$") for head in heads):
        return False
    for x, y in zip(a, b, strict=False):
        if "#" in (x, y):
            return True
        if x != y and "+" not in (x, y):
            return False
    longer = max(a, b, key=len)
    return len(a) == len(b) or longer[min(len(a), len(b)) :] == ["#"]
