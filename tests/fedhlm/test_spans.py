"""Contexts of spans as they travel, and the open spans of blocks."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm import spans
from fedhlm.bus.interface import Extras
from fedhlm.bus.party import Stamp
from fedhlm.protocol.messages import Escalation, EscalationBatch, RoutedEscalation, Verdict
from fedhlm.spans import NO_SPAN, PASSING, Attribute, BlockSpans, OpenSpan, PassedOn, contexts_in, extras_of, readable

ABOVE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b8-00"
STAMP = Stamp("porch")


class Noted:
    """A tracer that keeps what its spans are told."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str, dict[str, Attribute]]] = []

    def begin(self, name: str, kind: spans.SpanKind, parent: str = "", **attributes: Attribute) -> OpenSpan:
        return NotedSpan(self, parent, dict(attributes))


class NotedSpan:
    def __init__(self, tracer: Noted, context: str, attributes: dict[str, Attribute]) -> None:
        self.context = context
        self._tracer, self._attributes = tracer, attributes

    def note(self, **attributes: Attribute) -> None:
        self._attributes |= attributes

    def end(self, error: str = "") -> None:
        self._tracer.ended.append((str(self._attributes.get("status")), error, self._attributes))


def block(session: int = 1, epoch: int = 0, base: int = 5, *, closes: bool = False) -> Escalation:
    given: dict[str, Any] = {"base": 0, "extend": 0} if closes else {"base": base, "extend": 1}
    return Escalation(**STAMP(), session=session, epoch=epoch, ids=b"", patience_ms=1_000, **given)


def verdict(epoch: int = 0, base: int = 5, status: str = "settled") -> Verdict:
    return Verdict(**STAMP(), session=1, epoch=epoch, base=base, status=status, accepted=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        ABOVE.upper(),
        ABOVE + "\n",
        ABOVE + "-",
        "ff" + ABOVE[2:],
        "00-" + "0" * 32 + ABOVE[35:],
        ABOVE[:36] + "0" * 16 + "-01",
        ABOVE.replace("-", "_"),
        "x" * 10_000,
    ],
)
def test_what_is_no_context_is_not_handed_on(text: str) -> None:
    assert readable(text) == ""
    assert contexts_in(Extras(user=(("traceparent", text),))) == ("",)


@given(st.lists(st.sampled_from(["", ABOVE, OTHER]), min_size=1, max_size=5))
def test_a_message_has_one_context_for_each_block_in_order_or_none(contexts: list[str]) -> None:
    extras = extras_of(contexts)
    assert (extras is None) == (not any(contexts))
    assert contexts_in(extras, len(contexts)) == tuple(contexts)
    assert contexts_in(extras, len(contexts) + 1) == ("",) * (len(contexts) + 1)


def test_without_a_library_a_context_is_handed_on_and_nothing_is_begun() -> None:
    assert PASSING.begin("request", "server") is NO_SPAN
    span = PASSING.begin("request", "server", ABOVE, request="r")
    span.note(tokens=1)
    span.end("error")
    assert span == PassedOn(ABOVE)


def test_blocks_without_a_context_have_no_span() -> None:
    opened = BlockSpans(Noted())
    opened.begin("escalate", "client", "", block(), "")
    assert (len(opened), opened.extras(block())) == (0, None)


def test_a_verdict_ends_the_span_of_its_block_once_and_a_sign_of_work_does_not() -> None:
    tracer = Noted()
    opened = BlockSpans(tracer)
    opened.begin("escalate", "client", "", block(), ABOVE, drafts=4)
    opened.begin("escalate", "client", "", block(), ABOVE, drafts=4)  # it is sent again
    assert opened.extras(block()) == extras_of([ABOVE])
    opened.answered("", verdict(status="working"))
    opened.answered("porch", verdict())
    assert tracer.ended == []
    opened.answered("", verdict())
    opened.answered("", verdict())
    told = {"epoch": 0, "base": 5, "fixed": 0, "drafts": 4, "status": "settled", "source": "cloud", "accepted": 3}
    assert tracer.ended == [("settled", "", told)]
    opened.begin("escalate", "client", "", block(base=6), ABOVE)
    opened.answered("", verdict(base=6, status="refused"))
    assert tracer.ended[1][:2] == ("refused", "refused")
    assert len(opened) == 0


def test_a_rollback_and_the_end_of_a_session_end_what_is_open() -> None:
    tracer = Noted()
    opened = BlockSpans(tracer)
    for base in (5, 9):
        opened.begin("settle", "server", "porch", block(base=base), ABOVE)
    opened.begin("settle", "server", "porch", block(epoch=1), "")
    assert [status for status, *_ in tracer.ended] == ["superseded", "superseded"]
    opened.begin("settle", "server", "porch", block(epoch=1), ABOVE)
    opened.begin("settle", "server", "shed", block(epoch=1), ABOVE)
    opened.begin("settle", "server", "porch", block(epoch=1, closes=True), ABOVE)
    assert (len(opened), len(tracer.ended)) == (1, 3)
    opened.end_session("shed", 1, "abandoned")
    assert (len(opened), tracer.ended[-1][0]) == (0, "abandoned")


def test_a_batch_carries_the_context_of_each_of_its_blocks() -> None:
    opened = BlockSpans(PASSING)
    opened.begin("settle", "server", "porch", block(), ABOVE)
    opened.begin("settle", "server", "shed", block(), OTHER)
    items = tuple(RoutedEscalation(agent, block()) for agent in ("porch", "pond", "shed"))
    batch = EscalationBatch(**STAMP(), items=items)
    assert contexts_in(opened.extras(batch), 3) == (ABOVE, "", OTHER)


def test_work_on_several_blocks_is_a_span_inside_each_that_is_traced() -> None:
    tracer = Noted()
    opened = BlockSpans(tracer)
    opened.begin("verify", "server", "shed", block(), OTHER)
    blocks = [("pond", block()), ("shed", block())]
    with opened.inside("model call", blocks, batch=2):
        pass
    with pytest.raises(ValueError, match="x"), opened.inside("model call", blocks, batch=3):
        raise ValueError("x")
    assert [(error, told) for _, error, told in tracer.ended] == [("", {"batch": 2}), ("failed", {"batch": 3})]


def test_spans_that_nobody_answers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SESSIONS_MAX", 3)
    monkeypatch.setattr(spans, "BLOCKS_MAX", 2)
    tracer = Noted()
    opened = BlockSpans(tracer)
    for session in range(10):
        for base in range(5):
            opened.begin("verify", "server", "home/porch", block(session, base=base), ABOVE)
    assert len(opened) == 3 * 2
    assert {status for status, *_ in tracer.ended} == {"forgotten"}
