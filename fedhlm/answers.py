"""Puts an answer together from its pieces: in order, each once, and noticing missing ones. No clock, no I/O.

MQTT may deliver a piece twice, and a broken link may lose one. A piece that comes early waits for the ones before it.
"""

from collections import deque
from typing import Final, NamedTuple

import msgspec

from fedhlm.errors import AskError, DeadlinePassed, RequestCancelled, RequestNameTaken, RequestRefused
from fedhlm.protocol.fields import FinishReason, Source
from fedhlm.protocol.messages import Output
from fedhlm.protocol.sources import SOURCES

EARLY_MAX: Final = 1_024  # most pieces that wait for an earlier one
_OPEN, _CLOSE = "[unverified: ", "]"


class Piece(NamedTuple):
    """Some tokens of an answer: the text that they add, their ids, and the source of each.

    `position` is the number of the answer's tokens before this piece. Text may come later than its ids, when a
    character or a stop string is not complete yet.
    """

    text: str
    ids: tuple[int, ...]
    sources: tuple[Source, ...]
    position: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, or the part of it that has arrived.

    `finish` is None before the end. `error` explains the finish reasons "error" and "cancelled". `sources` has one
    entry per id of `ids`. `statistics` holds the agent's own figures (docs/protocol.md). `proof` is JSON with the
    receipt of the text, if it was asked for and the LLM has verified all of it (`verifiable`).
    """

    agent: str
    cluster: str
    request: str
    text: str = ""
    ids: tuple[int, ...] = ()
    sources: tuple[Source, ...] = ()
    finish: FinishReason | None = None
    error: str = ""
    statistics: dict[str, float] = {}
    proof: str | None = None

    def verifiable(self) -> bytes | None:
        """The answer as `fedhlm verify-receipt` reads it; None without a receipt."""
        if self.proof is None:
            return None
        tokens = [{"id": token, "source": source} for token, source in zip(self.ids, self.sources, strict=True)]
        return msgspec.json.encode({"text": self.text, "fedhlm": {**msgspec.json.decode(self.proof), "tokens": tokens}})


class Assembly:
    """Takes the outputs of one request in any order, and returns its pieces in the right order."""

    def __init__(self) -> None:
        self.last: Output | None = None  # the output that ends the answer, once everything before it has arrived
        self._text: list[str] = []
        self._ids: list[int] = []
        self._sources: list[Source] = []
        self._ready: deque[Piece] = deque()
        self._early: dict[tuple[int, bool], Output] = {}

    def take(self, output: Output) -> bool:
        """Add one output; False if it brings nothing new."""
        ends = output.finish is not None
        if self.last is not None:
            return False
        if output.refusal is not None or (output.finish == "error" and output.position < len(self._ids)):
            self.last = output  # it ends the answer, whatever else came under this name
            return True
        key = (output.position, ends)
        known = output.position < len(self._ids) or key in self._early
        empty = not (output.ids or ends)
        if known or empty or len(output.ids) != len(output.sources):
            return False
        if output.position > len(self._ids) and len(self._early) >= EARLY_MAX:
            return False  # the missing piece is reported all the same
        self._early[key] = output
        while (piece := self._following()) is not None:
            self._put(piece)
        return True

    def _following(self) -> Output | None:
        at = len(self._ids)
        if self.last is not None:
            return None
        return self._early.pop((at, False), None) or self._early.pop((at, True), None)

    def _put(self, output: Output) -> None:
        if output.finish is not None:
            self.last = output
        if output.ids or output.text:
            self._ready.append(Piece(output.text, output.ids, output.sources, output.position))
        self._text.append(output.text)
        self._ids += output.ids
        self._sources += output.sources

    def next(self) -> Piece | None:
        """Return the next piece in order; None if it has not arrived. Each piece is returned once."""
        return self._ready.popleft() if self._ready else None

    @property
    def hole(self) -> int | None:
        """The position of the first missing token, if later pieces have arrived already; else None."""
        return len(self._ids) if self._early and self.last is None else None

    def result(self, *, agent: str, cluster: str, request: str) -> Result:
        """Return the answer up to the first missing piece."""
        last = self.last
        return Result(
            agent=agent,
            cluster=cluster,
            request=request,
            text="".join(self._text),
            ids=tuple(self._ids),
            sources=tuple(self._sources),
            finish=None if last is None else last.finish,
            error="" if last is None else last.error,
            statistics={} if last is None else dict(last.statistics),
            proof=None if last is None else last.proof,
        )


class Marks:
    """Marks unverified text in a stream; `tokens` counts all tokens, `unverified` those that nobody has verified."""

    def __init__(self) -> None:
        self.tokens = 0
        self.unverified = 0
        self._open = False

    def put(self, piece: Piece) -> str:
        """Return what to print for a piece; text that follows its ids keeps their mark."""
        count = sum(SOURCES[source].unreachable for source in piece.sources)
        self.tokens += len(piece.ids)
        self.unverified += count
        mark = ""
        if piece.ids and bool(count) != self._open:
            mark = _CLOSE if self._open else _OPEN
            self._open = not self._open
        return mark + piece.text

    def end(self) -> str:
        """Return what to print after the last piece."""
        return _CLOSE if self._open else ""

    def summary(self) -> str:
        """Say how many tokens nobody has verified."""
        return f"nobody has verified {self.unverified} of {self.tokens} tokens"


def failure_of(last: Output, *, agent: str) -> AskError | None:
    """Return the error that the last output of a request means for the client; None if the text is complete."""
    if last.finish not in ("error", "cancelled"):
        return None
    kind: type[AskError] = RequestRefused if last.finish == "error" else RequestCancelled
    if last.refusal == "taken":
        kind = RequestNameTaken
    elif last.refusal == "late":  # the agent's clock struck before this one's
        kind = DeadlinePassed
    return kind(agent, last.request, last.error or f"{agent} ended the request without giving a reason")
