"""An agent that other programs' agents ask over A2A: its card, their requests, and the tasks that come of them.

Clients are known by the topics on which they read, since requests carry no other name. A client sees its own tasks only,
and an agent publishes answers on reply topics of its organization and cluster only, which access rules keep apart.
"""

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Final, NamedTuple

from edge_agent.local import LocalQuestions
from edge_agent.service import AgentService
from fedhlm.a2a import (
    CORRELATION_MAX,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    OFFLINE,
    ONLINE,
    OVER,
    RESPONDER_UNAVAILABLE,
    TASK_NOT_CANCELABLE,
    TASK_NOT_FOUND,
    TRANSPORT_ERROR,
    A2aCall,
    State,
    TaskShape,
    TaskState,
    about_of,
    card_of,
    client_of,
    error_of,
    read_call,
)
from fedhlm.answering import Question, Slice
from fedhlm.bus.interface import Bus, Delivery, Extras
from fedhlm.decoding.text import TOKEN_BYTES_MAX, encode_prompt
from fedhlm.errors import A2aError, BusError
from fedhlm.process.run import address_of
from fedhlm.protocol.fields import FinishReason, Refusal
from fedhlm.protocol.open_topics import A2A_CARD, A2A_REPLY, A2A_REQUEST
from fedhlm.settings import Config
from fedhlm.spans import contexts_in
from fedhlm.telemetry import Counters, warn_once

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # seconds between two looks whether the connection or the cluster has changed
WAITING_MAX: Final = 32  # tasks that are not over; further ones are refused
TASKS_MAX: Final = 128  # tasks that are remembered, those that are over included
_ENDS: Final[dict[FinishReason, State]] = {
    "stop": "completed",
    "length": "completed",
    "context": "completed",
    "cancelled": "canceled",
    "error": "failed",
}


class ReplyPath(NamedTuple):
    """Where the answers to a request go, and whose topic that is. `context` is that of the client's span."""

    topic: str
    correlation: bytes | None
    client: str
    context: str = ""


class AskedTask:
    """A task: what a client asked, its text so far, and the newest request that waits for its end.

    `path`, `call` and `shape` are of that request: a client that asks again has lost the answer to the first one.
    `cancels` are requests to cancel it that wait for its end.
    """

    def __init__(self, context: str, call: A2aCall, path: ReplyPath, now: TaskState) -> None:
        self.context = context
        self.now = now
        self.texts: list[str] = []
        self.refusal: Refusal | None = None
        self.cancels: list[tuple[A2aCall, ReplyPath]] = []
        self.work: asyncio.Task[None] | None = None
        self.answered = False
        self.wait_with(call, path)

    def wait_with(self, call: A2aCall, path: ReplyPath) -> None:
        """Send what is still to come to this request."""
        self.call, self.path = call, path
        self.shape = self.shape_for(call)

    def shape_for(self, call: A2aCall) -> TaskShape:
        """Write about this task in answers to a request."""
        return TaskShape(call.request, call.dialect, call.task, self.context)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)


class AgentA2a:
    """Publishes an agent's card and serves requests."""

    def __init__(self, service: AgentService, questions: LocalQuestions, config: Config, counters: Counters) -> None:
        self._service = service
        self._questions = questions
        self._config = config
        self._counters = counters
        self._tasks: OrderedDict[tuple[str, str], AskedTask] = OrderedDict()  # by client and task, oldest first
        self._open: set[asyncio.Task[None]] = set()
        self._told: tuple[Bus, int, str] | None = None
        self._at = ""  # the topic of the card

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Publish and serve for as long as the context is entered; then say that the agent is gone."""
        async with asyncio.TaskGroup() as group:
            telling = group.create_task(self._keep(), name="a2a")
            try:
                yield
            finally:
                telling.cancel()
                for task in self._tasks.values():
                    if task.work is not None:
                        task.work.cancel()
                await asyncio.gather(*self._open)
                if self._told is not None:
                    await self._publish_card(OFFLINE)

    async def _keep(self) -> None:
        while True:
            try:
                await self.tell()
            except BusError as exc:
                warn_once(log, "a2a", "nobody can ask over A2A now: %s", exc)
            await asyncio.sleep(LOOK_S)

    async def tell(self) -> None:
        """Publish the card and listen for requests, if the connection is new or the agent has moved.

        Raises:
            BusError: the broker rejects the subscription.
        """
        agent = self._service.agent
        party, bus = agent.party, agent.party.bus
        here = (bus, bus.statistics.reconnects, agent.cluster)
        if here == self._told or bus.protocol is None:
            return
        if bus.protocol != "5":
            warn_once(log, "a2a protocol", "A2A needs MQTT 5, and the broker speaks %s: no card", bus.protocol)
            return
        former, levels = self._told, self._levels()
        heard = A2A_REQUEST.name(**levels)
        before = () if former is None else (A2A_REQUEST.name(**(levels | {"cluster": former[2]})),)
        await party.listen({heard: self._hear}, instead_of=before)
        card = A2A_CARD.name(**levels)
        if self._at not in ("", card):  # of the cluster that the agent has left
            await bus.publish(self._at, b"", qos=A2A_CARD.qos, retain=True)
        self._at = card
        if await self._publish_card(ONLINE):
            self._told = here

    def _levels(self) -> dict[str, str]:
        agent = self._service.agent
        return {"org": self._config.a2a.org, "cluster": agent.cluster, "agent": agent.name}

    async def _publish_card(self, status: Extras) -> bool:
        agent = self._service.agent
        about = f"Agent {agent.name} of cluster {agent.cluster}, which drafts with {agent.fingerprint.model}."
        card = card_of(agent.name, about, str(address_of(self._config.broker)))
        return await agent.party.bus.publish(
            self._at, card, qos=A2A_CARD.qos, retain=A2A_CARD.retain, extras=status
        )  # fmt: skip

    async def _hear(self, delivery: Delivery) -> None:
        """Take a request. It is answered on reply topics only; any other topic could be somebody's who may not know."""
        extras, levels = delivery.extras or Extras(), self._levels()
        client = client_of(extras.response_topic, levels["org"], levels["cluster"])
        if delivery.retain or client is None:
            self._counters.add("refused_messages")
            why = "is retained" if delivery.retain else "has no Response Topic that is a reply topic of this cluster"
            warn_once(log, f"a2a {delivery.retain}", "ignored a request over A2A: it %s", why)
            return
        path = ReplyPath(extras.response_topic, extras.correlation, client, *contexts_in(extras))
        try:
            if not 0 < len(path.correlation or b"") <= CORRELATION_MAX:
                raise A2aError(TRANSPORT_ERROR, f"Correlation Data must be 1 to {CORRELATION_MAX} bytes")
            await self._serve(read_call(delivery.payload), path)
        except A2aError as exc:
            self._counters.add("refused_messages")
            await self._say(path, error_of(exc))

    async def _serve(self, call: A2aCall, path: ReplyPath) -> None:
        task = self._tasks.get((path.client, call.task))
        if call.method in ("send", "stream"):
            await (self._begin(call, path) if task is None else self._repeat(task, call, path))
            return
        if task is None:
            raise A2aError(TASK_NOT_FOUND, f"there is no task {call.task} of {path.client}", request=call.request)
        if call.method == "get":
            await self._say(path, task.shape_for(call).task(task.now, task.text, sent=False))
            return
        if task.work is None or task.now.state in OVER:
            raise _not_cancelable(task, call)
        task.cancels.append((call, path))
        task.work.cancel()

    async def _begin(self, call: A2aCall, path: ReplyPath) -> None:
        if sum(task.now.state not in OVER for task in self._tasks.values()) >= WAITING_MAX:
            self._counters.add("dropped_messages")
            raise A2aError(
                RESPONDER_UNAVAILABLE, f"at most {WAITING_MAX} tasks may wait: ask later", request=call.request
            )  # fmt: skip
        longest = TOKEN_BYTES_MAX * self._questions.offer.context
        if len(call.text) > longest:  # encoding it would block everything else
            told = f"message.parts must have at most {longest} characters (got {len(call.text)})"
            raise A2aError(INVALID_PARAMS, told, request=call.request)
        task = AskedTask(call.context or str(uuid.uuid4()), call, path, self._state("submitted"))
        self._tasks[path.client, call.task] = task
        self._forget()
        if call.method == "stream":
            await self._say(path, task.shape.state(task.now))
        elif call.at_once:
            await self._say_task(task)
        task.work = asyncio.create_task(self._work(task), name="a2a-work")
        ending = asyncio.create_task(self._see_to(task, task.work), name="a2a-task")
        self._open.add(ending)
        ending.add_done_callback(self._open.discard)

    async def _repeat(self, task: AskedTask, call: A2aCall, path: ReplyPath) -> None:
        """Answer a request for a task that there is already: the client asks again, because it heard nothing."""
        if call.context not in ("", task.context):
            told = f"message.contextId must be that of task {call.task}"
            raise A2aError(INVALID_PARAMS, told, request=call.request)
        task.wait_with(call, path)
        task.answered = False
        if call.method == "stream":
            if task.texts:
                await self._say(path, task.shape.piece(task.text, first=True, last=task.now.state in OVER))
            await self._say(path, task.shape.state(task.now))
        elif call.at_once or task.now.state in OVER:
            await self._say_task(task)

    def _forget(self) -> None:
        """Forget the oldest tasks that are over, where there are too many."""
        over = [key for key, task in self._tasks.items() if task.now.state in OVER]
        for key in over[: max(0, len(self._tasks) - TASKS_MAX)]:
            del self._tasks[key]

    def _state(self, state: State, reason: str = "", piece: Slice | None = None) -> TaskState:
        about = {} if piece is None or piece.finish is None else about_of(piece.finish, piece.statistics, piece.receipt)
        return TaskState(state, self._service.agent.party.stamp.wall_ms(), reason, about)

    async def _work(self, task: AskedTask) -> None:
        """Ask the agent, and tell a stream what comes."""
        offer, call = self._questions.offer, task.call
        ids = tuple(encode_prompt(offer.tokenizer, call.text, offer.bos_id))
        options = {"max_tokens": self._config.generation.max_tokens, **call.options}
        question = Question(task.path.client, ids, context=task.path.context, **options)
        async with aclosing(self._questions.answer(question)) as slices:
            async for piece in slices:
                await self._tell(task, piece)
                if piece.finish is not None:
                    task.refusal = piece.refusal
                    state: State = "rejected" if piece.refusal is not None else _ENDS[piece.finish]
                    task.now = self._state(state, piece.error, piece)

    async def _tell(self, task: AskedTask, piece: Slice) -> None:
        if task.now.state == "submitted" and (piece.text or piece.tokens):
            task.now = self._state("working")
            if task.call.method == "stream":
                await self._say(task.path, task.shape.state(task.now))
        first, last = not task.texts, piece.finish is not None
        if piece.text or (last and not first):
            task.texts.append(piece.text)
            if task.call.method == "stream":
                await self._say(task.path, task.shape.piece(piece.text, first=first, last=last))

    async def _see_to(self, task: AskedTask, work: asyncio.Task[None]) -> None:
        """Wait for the end of a task, and tell it to everybody who waits for it."""
        await asyncio.wait([work])
        if work.cancelled():
            task.now = task.now if task.now.state in OVER else self._state("canceled")
        elif (failure := work.exception()) is not None:
            log.error("a task over A2A failed", exc_info=failure)
            task.now = self._state("failed", f"{type(failure).__name__}: {failure}")
        if task.refusal == "busy":  # so that the client may ask for the same task again
            self._tasks.pop((task.path.client, task.call.task), None)
            error = A2aError(RESPONDER_UNAVAILABLE, task.now.reason, request=task.call.request)
            await self._say(task.path, error_of(error))
        elif task.call.method == "stream":
            await self._say(task.path, task.shape.state(task.now))
        elif not task.answered:
            await self._say_task(task)
        for call, path in task.cancels:
            if task.now.state == "canceled":
                await self._say(path, task.shape_for(call).task(task.now, task.text, sent=False))
            else:
                await self._say(path, error_of(_not_cancelable(task, call)))

    async def _say_task(self, task: AskedTask) -> None:
        task.answered = True
        whole = task.shape.task(task.now, task.text, sent=True)
        if not await self._say(task.path, whole):
            error = A2aError(INTERNAL_ERROR, "the answer could not be sent whole", request=task.call.request)
            await self._say(task.path, error_of(error))

    async def _say(self, path: ReplyPath, payload: bytes) -> bool:
        extras = Extras(correlation=path.correlation)
        bus = self._service.agent.party.bus
        sent = await bus.publish(path.topic, payload, qos=A2A_REPLY.qos, extras=extras)
        if not sent:
            self._counters.add("dropped_messages")
        return sent


def _not_cancelable(task: AskedTask, call: A2aCall) -> A2aError:
    return A2aError(TASK_NOT_CANCELABLE, f"task {call.task} is over: {task.now.state}", request=call.request)
