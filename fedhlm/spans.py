"""Spans: what a part does for one request, from when to when, and inside which other span. No I/O.

A part opens spans through a `Tracer`. By default that is `PASSING`, whose spans only hand on the context that came in;
`fedhlm.opentelemetry` has one that exports them. Contexts are W3C Trace Context: they travel as `traceparent`, in a user
property of MQTT 5 or a header of HTTP. MQTT 3.1.1 has no such properties, so there they are left out.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple, Protocol

from fedhlm.bus.interface import Extras
from fedhlm.protocol.messages import AnyMessage, Escalation, EscalationBatch, Verdict

TRACEPARENT: Final = "traceparent"
SESSIONS_MAX: Final = 4_096
BLOCKS_MAX: Final = 64  # open spans of one session
_CONTEXT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}\Z")

SpanKind = Literal["server", "client", "internal"]
"""A `server` span serves what another part's `client` span waits for."""
Attribute = str | int | float | bool


class OpenSpan(Protocol):
    """A piece of work that has begun."""

    @property
    def context(self) -> str:
        """The `traceparent` for whoever does a part of this work; empty where there is none."""

    def note(self, **attributes: Attribute) -> None:
        """Add attributes. They must not contain text of prompts or answers."""

    def end(self, error: str = "") -> None:
        """End it now, with the kind of error if there was one. A span ends once."""


class Tracer(Protocol):
    """Begins spans."""

    def begin(self, name: str, kind: SpanKind, parent: str = "", **attributes: Attribute) -> OpenSpan:
        """Begin a span inside the one that `parent` names. Without a readable parent it begins a trace of its own."""


class PassedOn(NamedTuple):
    """A span that is not exported. Its context is that of its parent, so that what follows belongs there."""

    context: str = ""

    def note(self, **attributes: Attribute) -> None:
        """See `OpenSpan.note`."""

    def end(self, error: str = "") -> None:
        """See `OpenSpan.end`."""


NO_SPAN: Final[OpenSpan] = PassedOn()


class _Passing:
    def begin(self, name: str, kind: SpanKind, parent: str = "", **attributes: Attribute) -> OpenSpan:
        del name, kind, attributes
        return PassedOn(parent) if parent else NO_SPAN


PASSING: Final[Tracer] = _Passing()


def readable(context: str) -> str:
    """Return a `traceparent` that came from outside, or an empty text if it is none."""
    return context if _CONTEXT.match(context) else ""


def contexts_in(extras: Extras | None, count: int = 1) -> tuple[str, ...]:
    """Return the contexts of the `count` blocks of a message, in order; empty texts unless it has one for each."""
    found = [value for name, value in extras.user if name == TRACEPARENT] if extras is not None else []
    return tuple(readable(value) for value in found) if len(found) == count else ("",) * count


def extras_of(contexts: Sequence[str]) -> Extras | None:
    """Return the properties that carry contexts, an empty one for a block without; None if no block has one."""
    return Extras(user=tuple((TRACEPARENT, context) for context in contexts)) if any(contexts) else None


class BlockSpans:
    """The open spans of blocks, by party, session, epoch and base: at most SESSIONS_MAX sessions.

    Only blocks that come with a context have one. A block that is sent again keeps its span. A new epoch, or the end of
    the session, ends the older ones.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._sessions: OrderedDict[tuple[str, int], dict[tuple[int, int], OpenSpan]] = OrderedDict()

    def __len__(self) -> int:
        """How many spans are open."""
        return sum(len(spans) for spans in self._sessions.values())

    def begin(
        self, name: str, kind: SpanKind, party: str, block: Escalation, context: str, **attributes: Attribute
    ) -> None:
        """Begin the span of a block inside the one that `context` names, unless it is open or there is none."""
        spans = self._sessions.get((party, block.session), {})
        for place in [place for place in spans if place[0] < block.epoch or block.closes]:
            self._end(party, block.session, place, "superseded")
        if not context or block.closes or (block.epoch, block.base) in spans:
            return
        spans = self._sessions.setdefault((party, block.session), {})
        spans[block.epoch, block.base] = self._tracer.begin(
            name, kind, context, epoch=block.epoch, base=block.base, fixed=block.fixed, **attributes
        )
        if len(spans) > BLOCKS_MAX:
            self._end(party, block.session, next(iter(spans)), "forgotten")
        while len(self._sessions) > SESSIONS_MAX:
            self.end_session(*next(iter(self._sessions)), "forgotten")

    @contextmanager
    def inside(self, name: str, blocks: Iterable[tuple[str, Escalation]], **attributes: Attribute) -> Iterator[None]:
        """A span around the context's work, inside that of each block that has one. Blocks come with their parties."""
        contexts = (self._context(party, block) for party, block in blocks) if self._sessions else ()
        spans = [self._tracer.begin(name, "internal", context, **attributes) for context in contexts if context]
        error = "failed"
        try:
            yield
            error = ""
        finally:
            for span in spans:
                span.end(error)

    def answered(self, party: str, verdict: Verdict) -> None:
        """End the span of the block that a verdict answers."""
        if verdict.status == "working":
            return
        error = verdict.status if verdict.status == "refused" else ""
        place = verdict.epoch, verdict.base
        self._end(
            party, verdict.session, place, verdict.status, error, source=verdict.source, accepted=verdict.accepted
        )

    def end_session(self, party: str, session: int, status: str) -> None:
        """End the spans of a session."""
        for place in list(self._sessions.get((party, session), {})):
            self._end(party, session, place, status)

    def _end(
        self, party: str, session: int, place: tuple[int, int], status: str, error: str = "", **attributes: Attribute
    ) -> None:
        spans = self._sessions.get((party, session), {})
        span = spans.pop(place, None)
        if span is not None:
            span.note(status=status, **attributes)
            span.end(error)
        if not spans:
            self._sessions.pop((party, session), None)

    def extras(self, message: AnyMessage) -> Extras | None:
        """The properties for a message with blocks: the contexts of their open spans. A single block is that of ''."""
        if not self._sessions:
            return None
        match message:
            case Escalation() as block:
                return extras_of([self._context("", block)])
            case EscalationBatch(items=items):
                return extras_of([self._context(item.agent, item.escalation) for item in items])
        return None

    def _context(self, party: str, block: Escalation) -> str:
        span = self._sessions.get((party, block.session), {}).get((block.epoch, block.base))
        return "" if span is None else span.context
