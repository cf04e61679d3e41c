"""Lists of items that a broker does not take whole: nothing is lost but what is too large alone, and the order stays."""

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.party import Stamp
from fedhlm.bus.pieces import divided
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import (
    AnyMessage,
    Assignment,
    Escalation,
    EscalationBatch,
    RoutedEscalation,
    RoutedVerdict,
    Uncertain,
    UncertainTokens,
    Verdict,
    VerdictBatch,
    Verified,
    VerifiedTokens,
)

STAMP = Stamp("edge")
HEAD: dict[str, Any] = {"session": 1, "epoch": 0, "base": 0}


def listing(kind: type, sizes: list[int]) -> Any:
    """A message of that kind with items of about these sizes, numbered by their agents or tokens."""
    if kind is EscalationBatch:
        blocks = [Escalation(**STAMP(), **HEAD, ids=bytes(size), patience_ms=1) for size in sizes]
        return EscalationBatch(
            **STAMP(), items=tuple(RoutedEscalation(f"a{n}", block) for n, block in enumerate(blocks))
        )
    if kind is VerdictBatch:
        verdicts = [Verdict(**STAMP(), **HEAD, status="settled", ids=bytes(size)) for size in sizes]
        return VerdictBatch(
            **STAMP(), items=tuple(RoutedVerdict(f"a{n}", verdict) for n, verdict in enumerate(verdicts))
        )
    keys = [bytes(size % 1_024) for size in sizes]
    if kind is VerifiedTokens:
        return VerifiedTokens(**STAMP(), space="s", items=tuple(Verified(key, n) for n, key in enumerate(keys)))
    doubts = tuple(Uncertain(n, n, 0.5, key) for n, key in enumerate(keys))
    return UncertainTokens(**STAMP(), session=1, space="s", items=doubts)


@given(
    kind=st.sampled_from([EscalationBatch, VerdictBatch, VerifiedTokens, UncertainTokens]),
    sizes=st.lists(st.integers(0, 3_000), min_size=1, max_size=40),
    limit=st.integers(200, 20_000),
)
def test_what_fits_travels_in_order_and_what_does_not_is_named(kind: type, sizes: list[int], limit: int) -> None:
    whole = listing(kind, sizes)

    def fits(message: AnyMessage) -> bool:
        return len(encode(message)) <= limit

    outcome: Any = divided(whole, fits, STAMP)
    parts, refused = outcome
    found = [*parts, *refused]
    assert all(map(fits, parts))
    assert not any(map(fits, refused))
    assert all(len(message.items) == 1 for message in found if message in refused)
    sent = list(itertools.chain.from_iterable(message.items for message in parts))
    lost = [message.items[0] for message in found[len(parts) :]]
    assert sorted(map(whole.items.index, sent)) == [whole.items.index(item) for item in sent]
    assert len(sent) + len(lost) == len(sizes)
    assert len({message.sequence for message in found}) == len(found), "every part has a number of its own"


def test_a_message_without_items_is_never_divided() -> None:
    message = Assignment(**STAMP(), cluster="x")
    assert divided(message, lambda _: True, STAMP) == ([message], [])
    assert divided(message, lambda _: False, STAMP) == ([], [message])
