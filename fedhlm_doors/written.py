"""Asks the questions of a request and writes their answers, as a stream or as a whole."""

import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Final, Protocol, Self

from fedhlm.answering import Answerer, Question, Slice
from fedhlm_doors.flow import together
from fedhlm_doors.refusals import ApiError

Stage = Callable[[AsyncGenerator[Slice, None]], AsyncGenerator[Slice, None]]
"""Changes the slices of an answer as they come. Closing it closes the answer."""

RETRY_MAX_S: Final = 60.0
MEAN_WEIGHT: Final = 0.2  # weight of the newest answer in the running mean of the seconds of answers


class Written(Protocol):
    """How an API writes the slices of a request. `kind` is the media type of a stream.

    `quiet` is what a stream sends when nothing comes for long.
    """

    kind: str
    quiet: bytes

    def feed(self, index: int, piece: Slice, /) -> None: ...

    def opening(self, index: int, /) -> bytes: ...

    def chunk(self, index: int, piece: Slice, /) -> bytes: ...

    def closing(self) -> bytes: ...

    def whole(self) -> bytes: ...

    def failed(self, error: ApiError, /) -> bytes: ...


class Pace:
    """How long an answer takes, to tell a client that was turned away when to come again. `clock_s` is monotonic."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._mean_s = 1.0

    def now_s(self) -> float:
        """The time on the monotonic clock, in seconds."""
        return self._clock_s()

    def ended(self, began_s: float) -> None:
        """Note that an answer which began at that time is complete."""
        self._mean_s += MEAN_WEIGHT * (self._clock_s() - began_s - self._mean_s)

    @property
    def retry_s(self) -> int:
        """The whole seconds in which a place in the queue should become free."""
        return math.ceil(min(max(self._mean_s, 1.0), RETRY_MAX_S))


def failure(end: Slice, retry_s: int) -> ApiError | None:
    """The error that a slice means; None if it means none."""
    if end.finish not in ("error", "cancelled"):
        return None
    if end.refusal == "busy":
        return ApiError(end.error, status=429, code="queue_full", retry_s=retry_s)
    return ApiError(end.error or f"the request ended: {end.finish}", status=500, code=end.refusal or end.finish)


class Questions:
    """The open questions of one request. Close it, whatever happens."""

    def __init__(self, answers: Sequence[AsyncGenerator[Slice, None]], pace: Pace) -> None:
        self._answers = answers
        self._pace = pace
        self._began_s = pace.now_s()

    @classmethod
    async def ask(cls, answerer: Answerer, questions: Sequence[Question], pace: Pace, *stages: Stage) -> Self:
        """Ask all questions, and return when each of them has its place in the queue.

        Every answer goes through the `stages`, in order.

        Raises:
            ApiError: one of them was turned away; then none is answered.
        """
        answers = [answerer.answer(question) for question in questions]
        for stage in stages:
            answers = [stage(answer) for answer in answers]
        asked = cls(answers, pace)
        try:
            for answer in asked._answers:
                error = failure(await anext(answer), pace.retry_s)
                if error is not None:
                    raise error
        except BaseException:
            await asked.aclose()
            raise
        return asked

    async def aclose(self) -> None:
        """Cancel what is not answered yet."""
        for answer in self._answers:
            await answer.aclose()

    async def stream(self, reply: Written) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of the answers. An error ends the stream with a chunk that says so."""
        for index in range(len(self._answers)):
            yield reply.opening(index)
        async with aclosing(together(self._answers)) as slices:
            async for index, piece in slices:
                error = failure(piece, self._pace.retry_s)
                if error is not None:
                    yield reply.failed(error)
                    return
                reply.feed(index, piece)
                yield reply.chunk(index, piece)
        self._pace.ended(self._began_s)
        yield reply.closing()

    async def whole(self, reply: Written) -> bytes:
        """Return the response with the whole answers.

        Raises:
            ApiError: an answer ended with an error.
        """
        async with aclosing(together(self._answers)) as slices:
            async for index, piece in slices:
                error = failure(piece, self._pace.retry_s)
                if error is not None:
                    raise error
                reply.feed(index, piece)
        self._pace.ended(self._began_s)
        return reply.whole()
