"""Answers clients on the cloud's own machine with the large model alone, whose tokens join the batches of the fleet."""

import random
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.service import LOCAL, CloudService
from cloud_verifier.sessions import Key, StaleBlock, UnprimedBlock
from cloud_verifier.verifier import Settled
from cloud_verifier.wiring import LargeModel
from fedhlm.answering import Offer, Question, Slice, TokenOrigin
from fedhlm.bus.party import Stamp
from fedhlm.decoding.sampling import law
from fedhlm.decoding.text import StoppedText, TextStream
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Escalation, Grammar, Prime, Sampling
from fedhlm.protocol.packing import pack_ids
from fedhlm.settings import Generation

OPEN_MAX: Final = 256
PATIENCE_MS: Final = 3_600_000
IMPOSSIBLE: Final = -9_999.0  # the logarithm of a probability of 0, as JSON can carry it


class ModelAlone:
    """The `Answerer` of a cloud. With a seed, its texts are those of the preset `exact` at an agent."""

    def __init__(self, service: CloudService, model: LargeModel, generation: Generation, offer: Offer) -> None:
        self._service = service
        self._model = model
        self._generation = generation
        self._offer = offer
        self._asked = 0
        self._open: set[Key] = set()

    @property
    def offer(self) -> Offer:
        """See `Answerer.offer`."""
        return self._offer

    async def answer(self, question: Question) -> AsyncGenerator[Slice, None]:
        """See `Answerer.answer`."""
        if len(self._open) >= OPEN_MAX:
            reason = f"the cloud has {OPEN_MAX} open questions: ask later"
            yield Slice(finish="error", error=reason, refusal="busy")
            return
        self._asked += 1
        key = Key(LOCAL, question.asker, self._asked)
        self._open.add(key)
        span, finish = self._service.tracer.begin("request", "server", question.context), "cancelled"
        try:
            yield Slice()
            async for piece in self._written(key, question):
                finish = piece.finish or finish
                yield piece
        finally:
            span.note(finish=finish)
            span.end("error" if finish == "error" else "")
            self._open.discard(key)
            self._service.forget(key)

    async def _written(self, key: Key, question: Question) -> AsyncGenerator[Slice, None]:
        began_s = time.monotonic()
        seed = random.SystemRandom().getrandbits(63) if question.seed is None else question.seed
        sampling = self._generation.sampling(
            seed,
            temperature=question.temperature,
            top_p=question.top_p,
            top_k=question.top_k,
            min_p=question.min_p,
            grammar=None if question.grammar is None else Grammar(len(question.ids), question.grammar),
        )
        context = list(question.ids)
        text = StoppedText(TextStream(self._offer.tokenizer), question.stop)
        finish: FinishReason | None = None
        while finish is None:
            rows: list[NDArray[Any]] = []
            watch = None if question.logprobs is None else rows.append
            token = await self._next(key, sampling, context, watch)
            if isinstance(token, str):
                yield Slice(finish="error", error=token)
                return
            context.append(token)
            _, new = text.push([token])
            yield Slice(new, (_origin(token, rows, sampling, question.logprobs),))
            finish = self._finish(token, context, question, stopped=text.stopped)
        count = len(context) - len(question.ids)
        statistics = {"tokens_cloud": float(count), "wall_s": time.monotonic() - began_s}
        yield Slice(text.rest(), finish=finish, statistics=statistics)

    async def _next(
        self, key: Key, sampling: Sampling, context: list[int], watch: Callable[[NDArray[Any]], object] | None
    ) -> int | str:
        """The token after the context, or why there is none."""
        primes = not self._service.holds(key)
        while True:
            before = Prime(sampling, self._model.fingerprint, self._packed(context)) if primes else None
            block = Escalation(
                **Stamp("local")(),
                session=key.session,
                epoch=0,
                base=len(context),
                ids=b"",
                patience_ms=PATIENCE_MS,
                before=before,
            )
            match await self._service.settle(key, block, watch):
                case Settled(ids=[token]):
                    return token
                case UnprimedBlock() | StaleBlock() | Settled() if not primes:
                    primes = True
                case declined:
                    return getattr(declined, "reason", "the cloud lost the session")

    def _packed(self, ids: list[int]) -> bytes:
        return pack_ids(ids, self._model.fingerprint.vocab_size)

    def _finish(self, token: int, context: list[int], question: Question, *, stopped: bool) -> FinishReason | None:
        if stopped or token in self._model.eos_ids:
            return "stop"
        if len(context) - len(question.ids) >= question.max_tokens:
            return "length"
        return "context" if len(context) >= self._offer.context else None


def _origin(token: int, rows: list[NDArray[Any]], sampling: Sampling, wanted: int | None) -> TokenOrigin:
    """The token's origin, with the log-probabilities of `wanted` alternatives under the law that it was drawn from."""
    if wanted is None or not rows:
        return TokenOrigin(token, "cloud")
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(law(rows[-1], sampling)), IMPOSSIBLE)
    best = np.argsort(-logs, kind="stable")[:wanted]
    top = tuple((int(i), float(logs[i])) for i in best)
    return TokenOrigin(token, "cloud", logprob=float(logs[token]), top=top)
