"""Serves prompts from the bus, one at a time, and publishes committed tokens as they come."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from edge_agent.connection import Connection
from edge_agent.core import AgentCore
from edge_agent.events import Committed
from edge_agent.refusals import AT_ONCE, PAUSE_S, DueRefusal, Refusals
from edge_agent.request_times import RequestTimes
from edge_agent.requests import CANCELLED, GONE, LATE, LATE_TEXT, End, Requests, RoutedPrompt
from edge_agent.result import GenerationResult, Job
from fedhlm.answering import Slice
from fedhlm.answers import Piece
from fedhlm.bus.interface import Delivery
from fedhlm.bus.party import Received
from fedhlm.config import Loaded
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.grammar import Constrain, nothing_constrains
from fedhlm.decoding.text import TOKEN_BYTES_MAX, StoppedText, TextStream, encode_prompt
from fedhlm.errors import BusError, ConfigError, FedhlmError, ProtocolError
from fedhlm.process.saver import InThread, inline
from fedhlm.protocol import topics
from fedhlm.protocol.fields import MAX_METRICS, MAX_REASON, FinishReason, Refusal
from fedhlm.protocol.messages import Cancel, Grammar, MetricsReport, Output, Presence, Prompt, Sampling
from fedhlm.protocol.open_topics import as_json
from fedhlm.protocol.prompts import unusable
from fedhlm.protocol.sources import SOURCES
from fedhlm.receipts import Receipt, Sign, proof_of, receipt_of, unsigned
from fedhlm.settings import Generation as GenerationConfig
from fedhlm.spans import contexts_in
from fedhlm.telemetry import warn_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

RENEW_AGAIN_S: Final = 30.0
REFUSE_AGAIN_S: Final = 1.0  # after which a refusal that did not fit into the outgoing queue is sent again
NOBODY: Final = "nobody"  # where a refusal goes whose client has no readable name


def _line(text: str) -> str:
    return " ".join(text.split())


class ModelFacts(NamedTuple):
    """What the service must know of the SLM, apart from drafting. `context` is in tokens."""

    tokenizer: "Tokenizer"
    bos_id: int | None
    eos_ids: frozenset[int]
    context: int
    constrain: Constrain = nothing_constrains


class AgentService:
    """Serves prompts until cancelled. After a move, `connection` gives the broker a last will in the new cluster.

    `sign` adds the device's signature to receipts.
    """

    def __init__(
        self,
        *,
        agent: AgentCore,
        loaded: Loaded,
        model: ModelFacts,
        connection: Connection,
        in_thread: InThread = inline,
    ) -> None:
        self.agent = agent
        self._in_thread = in_thread
        self.connection = connection
        self.sign: Sign = unsigned
        self._moved = asyncio.Event()
        self._turn = asyncio.Lock()
        self._loaded = loaded
        self._model = model
        self._counters = agent.party.counters
        self.requests = Requests(agent.name)
        self._counters.measure("num_requests_running", lambda: self._current is not None)
        self._counters.measure("num_requests_waiting", self._waiting)
        self._refusals = Refusals()
        self._refused = asyncio.Event()
        self._work = asyncio.Event()
        self._current: RoutedPrompt | None = None
        agent.party.on_refused = self._answer_unusable

    async def subscribe(self) -> None:
        """Subscribe to the agent's topics, before the bus connects, so that the agent hears prompts once online."""
        await self.agent.subscribe()

    async def run(self) -> None:
        """Serve until cancelled, or until the broker refuses the connection for good (BusError)."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(), name="agent-receive")
                group.create_task(self._serve(), name="agent-serve")
                group.create_task(self.agent.auditor.keep(), name="agent-audits")
                group.create_task(self._keep_journal(), name="agent-journal")
                group.create_task(self._renew(), name="agent-renew")
                group.create_task(self._send_refusals(), name="agent-refusals")
                group.create_task(self._report(), name="agent-report")
        finally:
            self.agent.flush()

    async def _keep_journal(self) -> None:
        agent = self.agent
        await agent.party.keep_journal(topics.AGENT_JOURNAL, lambda: {"cluster": agent.cluster, "agent": agent.name})

    async def _report(self) -> None:
        """Send the agent's metrics to its edge, as often as `telemetry.report_s` says."""
        agent, every_s = self.agent, self._loaded.config.telemetry.report_s
        while every_s:
            await asyncio.sleep(every_s)
            values = dict(list(self._counters.snapshot().items())[:MAX_METRICS])
            message = MetricsReport(**agent.party.stamp(), values=values)
            await agent.party.send(topics.AGENT_METRICS, message, cluster=agent.cluster, agent=agent.name)

    async def _receive(self) -> None:
        party = self.agent.party
        bus = None
        while bus is not party.bus:  # a closed bus ends its messages; a new bus may have replaced it
            bus = party.bus
            async for received in party.received():
                if isinstance(received.message, Prompt):
                    await self._accept(received.message, received)
                    continue
                if isinstance(received.message, Cancel):
                    await self.cancel(received.message)
                    continue
                if received.topic is topics.CLIENT_STATUS and isinstance(received.message, Presence):
                    await self._stop(self.requests.gone(received.message, retained=received.retained), GONE)
                    continue
                before = self.agent.cluster
                if not await self.agent.handle(received):
                    self._counters.add("refused_messages")
                if self.agent.cluster != before:
                    self._moved.set()

    async def _renew(self) -> None:
        """After each move, replace the connection by one whose last will is in the new cluster."""
        while True:
            await self._moved.wait()
            self._moved.clear()
            try:
                await self._reconnect()
            except BusError as exc:
                warn_once(log, "renew", "no second connection, trying again every %g s: %s", RENEW_AGAIN_S, exc)
                await asyncio.sleep(RENEW_AGAIN_S)
                self._moved.set()

    async def _reconnect(self) -> None:
        connection = self.connection
        membership = self.agent.membership
        cluster, filters = membership.cluster, membership.filters()
        if cluster == connection.cluster:
            return
        if connection.alone:
            async with self._turn:
                await connection.replace(cluster, filters)
            return
        bus = await connection.successor(cluster, filters)
        adopted = False
        try:
            # Between two generations, so that outputs stay in order.
            async with self._turn:
                if cluster == membership.cluster:
                    adopted = True
                    await connection.adopt(bus, cluster)
                    await self.agent.subscribe()  # filters that were added meanwhile
        finally:
            if not adopted:  # the agent has moved again, and `_moved` is set again
                await bus.__aexit__(None, None, None)

    async def _accept(self, prompt: Prompt, received: Received) -> None:
        if received.retained:  # it was asked at another time, and would be answered at every start
            self._counters.add("refused_messages")
            warn_once(log, "retained", "ignored the retained prompt %s of %s", prompt.request, prompt.sender)
            return
        if self.requests.knows(prompt):
            self._counters.add("duplicate_messages")
            return
        (context,) = contexts_in(received.extras)
        now_s = asyncio.get_running_loop().time()
        await self.admit(RoutedPrompt(received.levels["cluster"], prompt, now_s, context=context))

    async def admit(self, request: RoutedPrompt) -> None:
        """Queue a request, which is served in its turn, or end it at once."""
        request.trace(self.agent.party.tracer)
        end = self.requests.admit(request)
        if end is None:
            self._work.set()
            return
        if end.refusal == "busy":
            self._counters.add("dropped_messages")
        if request.tell is not None:
            await self._end(request, end)
            return
        self.requests.close(request)
        log.info("request %s: refused, %s", request.prompt.request, _line(end.error))
        request.span.end(end.refusal or end.finish)
        self._refuse(request.cluster, request.prompt.request, request.prompt.sender, end)

    def _refuse(self, cluster: str, request: str, client: str | None, end: End) -> None:
        """Answer a prompt that is not served. The answer waits its turn, because a thousand of them may be due."""
        self._count(end)
        output = Output(
            **self.agent.party.stamp(),
            request=request,
            position=0,
            ids=(),
            sources=(),
            text="",
            finish=end.finish,
            error=end.error[:MAX_REASON],
            client=client,
            refusal=end.refusal,
        )
        if self._refusals.add(DueRefusal(cluster, client or NOBODY, output)):
            self._refused.set()
        else:
            self._counters.add("dropped_messages")
            warn_once(log, "refusals", "too many prompts to refuse: %s gets no answer to %s", client, request)

    def _waiting(self) -> int:
        return max(0, len(self.requests.open) - (self._current is not None))

    def _count(self, end: End) -> None:
        if end.refusal is not None:
            self._counters.add("refused_requests", label=end.refusal)

    async def _send_refusals(self) -> None:
        party = self.agent.party
        while True:
            if not self._refusals:
                self._refused.clear()
                await self._refused.wait()
            for cluster, client, output in self._refusals.take(AT_ONCE):
                levels = {"cluster": cluster, "agent": self.agent.name, "client": client}
                sent = await party.send(topics.OUTPUT, output, expiry_s=None, **levels)
                while not (sent or sent.too_large):
                    await asyncio.sleep(REFUSE_AGAIN_S)
                    sent = await party.send(topics.OUTPUT, output, expiry_s=None, **levels)
            await asyncio.sleep(PAUSE_S)

    async def cancel(self, message: Cancel) -> None:
        """End a request of the message's sender, whether it waits or is being served."""
        found = self.requests.cancel(message)
        await self._stop([] if found is None else [found], CANCELLED)

    async def _stop(self, requests: list[RoutedPrompt], end: End) -> None:
        """End requests before their texts are whole."""
        for request in requests:
            if request is self._current:
                self.agent.cancel("cancelled")
                request.over = end  # also before the first token, and between two tokens
            else:
                await self._end(request, end)

    async def _answer_unusable(self, delivery: Delivery, error: ProtocolError) -> None:
        """Tell the client that its request is unusable, if the request's name is readable."""
        row, levels = topics.lookup(delivery.topic, self.agent.party.root) or (None, {})
        found = (
            None if row not in (topics.PROMPT, topics.PROMPT_FROM) or delivery.retain else unusable(delivery.payload)
        )
        if found is None:
            return
        client = levels.get("client", found.client)
        self._refuse(levels["cluster"], found.request, client, End("error", found.reason or str(error), "invalid"))

    async def _serve(self) -> None:
        while True:
            request = self.requests.take_turn()
            if request is None:
                self._work.clear()
                await self._work.wait()
                continue
            self._current = request
            try:
                if asyncio.get_running_loop().time() >= request.limit_s:
                    await self._end(request, LATE)
                else:
                    await self._complete_in_turn(request)
            except (ConfigError, ValueError) as exc:
                await self._end(request, End("error", str(exc), None if request.count else "invalid"))
            except FedhlmError as exc:
                await self._end(request, End("error", str(exc)))
            except Exception as exc:  # the failure of one request must not end the service
                log.exception("request %s failed", request.prompt.request)
                await self._end(request, End("error", f"{type(exc).__name__}: {exc}"))
            finally:
                self._current = None
                self.requests.close(request)

    async def _end(self, request: RoutedPrompt, end: End) -> None:
        """Publish the last output of a request. If it has been published already, only log the error."""
        self.requests.close(request)
        self._count(end)
        if request.answered:
            log.error("after the end of request %s: %s", request.prompt.request, end.error)
            return
        await self._publish(request, [], "", finish=end.finish, error=end.error[:MAX_REASON], refusal=end.refusal)
        log.info(
            "request %s: %s after %d tokens, %s", request.prompt.request, end.finish, request.count, _line(end.error)
        )

    async def complete(
        self, prompt: Prompt, show: Callable[[Piece], object] | None = None, *, cluster: str | None = None
    ) -> GenerationResult:
        """Serve one prompt. `show` receives tokens and text as they are committed. Calls are served one after the other.

        The output goes to `cluster`, through which the prompt came (None: the agent's own).

        Raises:
            ConfigError: the preset is unknown, or this agent does not allow it.
            GrammarError: the grammar cannot be used.
            ValueError: the prompt has no tokens, or is longer than the model's context.
        """
        request = RoutedPrompt(cluster or self.agent.cluster, prompt)
        request.trace(self.agent.party.tracer)
        return await self._complete_in_turn(request, show)

    async def _complete_in_turn(
        self, request: RoutedPrompt, show: Callable[[Piece], object] | None = None
    ) -> GenerationResult:
        async with self._turn:
            return await self._complete(request, show)

    async def _complete(self, request: RoutedPrompt, show: Callable[[Piece], object] | None) -> GenerationResult:
        prompt, now_s = request.prompt, asyncio.get_running_loop().time
        times = RequestTimes(self._counters, request.began_s or now_s())
        config = self._config(prompt)
        text = StoppedText(TextStream(self._model.tokenizer), prompt.stop)

        async def publish(tokens: list[Committed]) -> FinishReason | None:
            count, new = text.push([t.token for t in tokens])
            times.committed(count, now_s())
            if count or new:
                if show is not None:
                    sent = tokens[:count]
                    ids, sources = tuple(t.token for t in sent), tuple(t.source for t in sent)
                    show(Piece(new, ids, sources, request.count))
                await self._publish(request, tokens[:count], new)
            if text.stopped:
                return "stop"
            if request.over is not None:
                return request.over.finish
            return "cancelled" if now_s() >= request.limit_s else None

        longest = TOKEN_BYTES_MAX * self._model.context
        if len(prompt.text) > longest:  # encoding it would block everything else
            raise ValueError(f"prompt must be at most {longest} characters (got {len(prompt.text)})")
        ids = request.ids
        if ids is None:
            ids = encode_prompt(self._model.tokenizer, prompt.text, self._model.bos_id)
        job = Job(
            config,
            await self._sampling(prompt, config, len(ids)),
            max_tokens=prompt.max_tokens,
            context_max=self._model.context,
            eos_ids=self._model.eos_ids,
        )
        context = request.span.context
        result = await self.agent.generate(job, list(ids), publish, request.judged, self._read, context)
        times.ended(now_s(), prompt_tokens=len(ids))
        result.keep(request.count)
        if text.stopped:
            result.finish = "stop"
        if request.over is not None:
            result.finish, result.error = request.over.finish, request.over.error
        elif result.finish == "cancelled":
            result.error = LATE_TEXT.error
        rest = text.rest()
        if show is not None:
            show(Piece(rest, (), (), request.count))
        result.receipt = self._receipt(request, job, ids, result)
        await self._publish(request, [], rest, finish=result.finish, error=result.error, result=result, ids=ids)
        log.info("request %s: %s", prompt.request, result.summary())
        await self.agent.save()
        return result

    def _receipt(
        self, request: RoutedPrompt, job: Job, prompt: Sequence[int], result: GenerationResult
    ) -> Receipt | None:
        """The receipt of a text of which the LLM has verified every token; None for any other, or if nobody wants it.

        A text with tokens that are not certain to be the LLM's own has none.
        """
        large, agent = self.agent.upstream, self.agent
        if not request.prompt.receipt and request.tell is None:
            return None
        whole = result.finish in ("stop", "length", "context") and result.ids
        verified = all(SOURCES[source].verified for source in result.sources)
        if (
            large is None
            or not whole
            or not verified
            or result.approximate
            or not COUPLINGS[job.sampling.coupling].shared
        ):
            return None
        receipt = receipt_of(
            job.sampling,
            large,
            agent=agent.name,
            cluster=agent.cluster,
            made_ms=agent.party.stamp.wall_ms(),
            prompt=prompt,
            ids=result.ids,
        )
        return self.sign(receipt)

    def _read(self, ids: Sequence[int]) -> str:
        """The text of ids with its special tokens, some of which open a tool call."""
        return str(self._model.tokenizer.decode(list(ids), skip_special_tokens=False))

    def _config(self, prompt: Prompt) -> GenerationConfig:
        return self._loaded.asked(prompt.preset).config.generation

    async def _sampling(self, prompt: Prompt, config: GenerationConfig, start: int) -> Sampling:
        grammar = None
        if prompt.grammar is not None:
            grammar = Grammar(start, prompt.grammar)
            await self._in_thread(self._model.constrain, grammar)  # an error belongs to this request
        seed = prompt.seed
        if seed is None:  # so that two outputs never share their noise
            digest = hashlib.sha256(f"{config.seed}/{self.agent.name}/{prompt.request}".encode()).digest()
            seed = int.from_bytes(digest[:8]) >> 1
        return config.sampling(
            seed,
            temperature=prompt.temperature,
            top_p=prompt.top_p,
            top_k=prompt.top_k,
            min_p=prompt.min_p,
            grammar=grammar,
        )

    async def _publish(
        self,
        request: RoutedPrompt,
        tokens: list[Committed],
        text: str,
        *,
        finish: FinishReason | None = None,
        error: str = "",
        result: GenerationResult | None = None,
        ids: Sequence[int] = (),
        refusal: Refusal | None = None,
    ) -> None:
        party, prompt = self.agent.party, request.prompt
        statistics = {} if result is None else result.statistics()
        receipt = None if result is None else result.receipt
        if finish is not None:
            request.span.note(finish=finish, **statistics)
            request.span.end((refusal or "error") if finish == "error" else "")
        if request.tell is not None:
            drafting = None if result is None else result.drafting()
            origins = request.origins(tokens)
            request.tell(Slice(text, origins, finish, error, refusal, statistics, drafting, receipt=receipt))
            request.count += len(tokens)
            request.answered = finish is not None
            return
        message = Output(
            **party.stamp(),
            request=prompt.request,
            position=request.count,
            ids=tuple(t.token for t in tokens),
            sources=tuple(t.source for t in tokens),
            text=text,
            finish=finish,
            error=error,
            statistics=statistics,
            client=prompt.sender,
            refusal=refusal,
            proof=None if receipt is None else as_json(proof_of(receipt, ids)).decode(),
        )
        levels = {"cluster": request.cluster, "agent": self.agent.name, "client": prompt.sender}
        sent = await party.send(topics.OUTPUT, message, expiry_s=None, **levels)
        if sent.too_large and finish is not None:  # better without the figures than not at all
            message = replace(message, statistics={}, proof=None)
            sent = await party.send(topics.OUTPUT, message, expiry_s=None, **levels)
        if sent.too_large:
            request.over = End("error", party.why_too_large())
            if finish is not None:
                message = replace(message, text="", finish="error", error=request.over.error)
                await party.send(topics.OUTPUT, message, expiry_s=None, **levels)
        else:
            request.count += len(tokens)
        request.answered = finish is not None
