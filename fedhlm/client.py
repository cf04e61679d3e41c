"""The Python client, which asks agents for text.

    async with fedhlm.Client("mqtt://127.0.0.1") as client:
        async for piece in client.ask("porch", "Oil prices rise"):
            print(piece.text, end="", flush=True)

A client is one connection to one broker. It may ask any number of agents at the same time.
"""

# Client and Answer belong together and use each other's private attributes.
# ruff: noqa: SLF001

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from fedhlm.answers import Piece, Result, failure_of
from fedhlm.bus.identity import client_id
from fedhlm.bus.interface import Bus
from fedhlm.bus.own_name import own_name
from fedhlm.bus.party import Party, Received, Stamp
from fedhlm.client_presence import birth_and_will, new_number
from fedhlm.errors import (
    AgentOffline,
    AskError,
    BusError,
    ConfigError,
    DeadlinePassed,
    PiecesLost,
    RequestCancelled,
)
from fedhlm.open_request import OpenRequest, extras_for, now_s, within
from fedhlm.protocol import prompts, topics
from fedhlm.protocol.messages import Cancel, Output, Presence, Prompt
from fedhlm.protocol.roles import ROLES
from fedhlm.settings import Broker
from fedhlm.telemetry import Counters

NAME: Final = "client"
AWAY_S: Final = 5.0
HOLE_S: Final = 5.0
PATIENCE_S: Final = 120.0
WINDOW: Final = 128  # open requests at one agent; it refuses more than 192 of one client, and brokers drop a thousand
_DEADLINE_MAX_S: Final = 1e9
_MOVE_S: Final = 1.0  # while an agent moves, it is in two clusters for up to this long
_NAME_BYTES: Final = 48  # most bytes of the client's name in the name of a request


class Client:
    """Asks agents over one broker.

    Args:
        bus: a URL (`mqtts://host`), a broker section of the settings (certificates, passwords), or a bus that is not
            entered yet. With a URL or a section, agents end the client's requests when its connection ends.
        cluster: the cluster of the agents; None searches all clusters.
        name: the sender of all prompts, to which the answers go. The name in a user name or certificate replaces it.
        root: the first levels of all topics.
        away_s: seconds for which an agent may be offline before this is an error.
        hole_s: seconds for which a missing piece may still come after later pieces.
        hear: called with every valid message, also those of topics that were added with `subscribe`.
        counters: counts the messages; by default the client's own.
        stamp: makes the headers of outgoing messages; by default one with `name` as the sender.

    Raises:
        ConfigError: the URL, the name or a certificate file cannot be used.
    """

    def __init__(
        self,
        bus: "str | Broker | Bus",
        *,
        cluster: str | None = None,
        name: str = NAME,
        root: str | None = None,
        away_s: float = AWAY_S,
        hole_s: float = HOLE_S,
        hear: Callable[[Received], object] | None = None,
        counters: Counters | None = None,
        stamp: Stamp | None = None,
    ) -> None:
        number, connection = new_number(), None
        if isinstance(bus, str):
            bus = Broker(url=bus)
        if isinstance(bus, Broker):
            from fedhlm.process.run import address_of, bus_of  # imports the MQTT library

            # Answers go to the sender of the prompt. The broker delivers only those for the name that we log in with.
            name = own_name(address_of(bus)) or name
            root = root or bus.root
            prompts.check("agent", name)
            # Each client needs its own id, because a second client with the same id would disconnect the first.
            identity = client_id("client", name, number, root=root)
            stamp = stamp or Stamp(name)
            birth, will = birth_and_will(stamp, number, root)
            bus = bus_of(bus, client_id=identity, birth=birth, will=will, connect_timeout_s=bus.connect_timeout_s)
            connection = number
        if cluster is not None:
            prompts.check("cluster", cluster)
        prompts.check("agent", name)
        self.cluster = cluster
        self.away_s = away_s
        self.hole_s = hole_s
        self.party = Party(
            bus=bus, stamp=stamp or Stamp(name), counters=counters or Counters(), root=root or topics.DEFAULT_ROOT
        )
        self.party.extras = lambda message: extras_for(message, self._open)
        self._hear = hear
        self._prefix = f"{name[:_NAME_BYTES]}-{number}"
        self._connection = connection
        self._asked = 0
        self._open: dict[str, OpenRequest] = {}
        self._windows: dict[tuple[str, str], asyncio.Semaphore] = {}  # by cluster and agent
        self._online: dict[str, dict[str, bool]] = {}  # agent -> cluster -> whether it is online there
        self._changed = asyncio.Event()
        self._heard_of: set[str] = set()
        self._failure: BusError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            BusError: the broker cannot be reached in time, or rejects the connection.
        """
        self._loop = asyncio.get_running_loop()
        await self.party.bus.__aenter__()
        self._reader = asyncio.create_task(self._read(), name=f"client {self.party.stamp.sender}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel all open requests and disconnect."""
        for state in list(self._open.values()):
            await self._withdraw(state)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._reader.cancel()
        await asyncio.wait([self._reader])
        await self.party.bus.__aexit__(None, None, None)
        if error is None and not self._reader.cancelled() and (broken := self._reader.exception()) is not None:
            raise broken  # an error of `hear`

    def ask(
        self,
        agent: str,
        text: str,
        *,
        cluster: str | None = None,
        max_tokens: int = 64,
        seed: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        stop: tuple[str, ...] = (),
        preset: str | None = None,
        grammar: str | None = None,
        receipt: bool = False,
        deadline_s: float | None = None,
        patience_s: float = PATIENCE_S,
        request: str | None = None,
        traceparent: str = "",
    ) -> "Answer":
        """Return an answer to iterate over by pieces, or to await by `whole`. Either sends the prompt when it begins.

        Leaving the iteration early, or `aclose`, cancels the request. For options that are None the agent uses its own
        configuration. `deadline_s` limits the time of the whole answer, and `patience_s` the time without a piece of
        it, both in seconds. `request` is its name; None gives a new unique one. The answer is held to `grammar`, in
        llguidance's Lark dialect (`fedhlm.decoding.grammar`). With `receipt`, `Result.proof` is asked for. `traceparent`
        names the caller's span, in W3C Trace Context; a broker of MQTT 3.1.1 does not carry it.

        Raises:
            ConfigError: a value is out of range.
        """
        if deadline_s is not None and not 0.0 < deadline_s <= _DEADLINE_MAX_S:
            raise ConfigError("deadline_s", deadline_s, f"seconds above 0 and up to {_DEADLINE_MAX_S:g}")
        self._asked += 1
        fields = {
            "text": text,
            "max_tokens": max_tokens,
            "seed": seed,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "stop": tuple(stop),
            "preset": preset,
            "grammar": grammar,
            "receipt": receipt,
        }
        fields["request"] = request or f"{self._prefix}-{self._asked}"
        place = {"agent": agent} | ({} if cluster is None else {"cluster": cluster})
        for key, value in (place | fields).items():
            prompts.check(key, value)
        state = OpenRequest(agent, cluster or self.cluster, fields, traceparent)
        return Answer(self, state, deadline_s=deadline_s, patience_s=patience_s)

    async def write(self, agent: str, text: str, **options: Any) -> Result:
        """Ask and wait for the whole answer. `options` are those of `ask`.

        Raises:
            AskError: the answer is not complete.
            BusError: the bus is closed, or its queue is full.
            ConfigError: a value is out of range, or several clusters have an agent of this name.
        """
        async with self.ask(agent, text, **options) as answer:
            return await answer.whole()

    async def subscribe(self, *filters: str) -> None:
        """Receive more topics, whose messages go to `hear`. BusError: the broker rejects a filter."""
        await self.party.bus.subscribe(*filters)

    async def find(self, agent: str, cluster: str | None = None) -> str:
        """Return the cluster in which an agent is online.

        Raises:
            AgentOffline: the agent is not online, and did not come online within `away_s` seconds.
            ConfigError: several clusters have an agent of this name.
            BusError: the bus was closed, or the broker rejects the subscription to presence.
        """
        return await self._find(agent, cluster or self.cluster, "")

    async def _find(self, agent: str, cluster: str | None, request: str) -> str:
        await self._watch(agent, cluster)
        began_s = now_s()
        while True:
            places = self._places(agent)
            # An agent that has moved still serves in its old cluster, as its presence there shows.
            if cluster is not None and places and cluster in self._online[agent]:
                return cluster
            if cluster is None and len(places) == 1:
                return places[0]
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            several = cluster is None and bool(places)
            if not await within(self._changed, began_s + (_MOVE_S if several else self.away_s)):
                named = ", ".join(places)
                if several:
                    raise ConfigError("cluster", None, f"one of {named}, where {agent} is online")
                where = "any cluster" if cluster is None else f"cluster {cluster}"
                found = f" (it is in {named})" if named else ""
                raise AgentOffline(agent, request, f"{agent} is not online in {where} at this broker{found}")

    async def _watch(self, agent: str, cluster: str | None) -> None:
        if agent in self._heard_of:
            return
        try:
            await self._hear_of(agent, "+")
        except BusError:  # the broker allows a client one cluster only
            if cluster is None:
                raise
            await self._hear_of(agent, cluster)
        self._heard_of.add(agent)

    async def _hear_of(self, agent: str, cluster: str) -> None:
        root, bus, me = self.party.root, self.party.bus, self.party.stamp.sender
        await bus.subscribe(topics.AGENT_STATUS.name(root, cluster=cluster, agent=agent))
        # At QoS 0, because a thousand refusals may come at once.
        await bus.subscribe(topics.OUTPUT.name(root, cluster=cluster, agent=agent, client=me), qos=0)

    def _places(self, agent: str) -> list[str]:
        return sorted(cluster for cluster, online in self._online.get(agent, {}).items() if online)

    async def _read(self) -> None:
        reason = "the bus is closed"
        try:
            async for received in self.party.received():
                self._take(received)
                if self._hear is not None:
                    self._hear(received)
        except BusError as exc:
            reason = str(exc)
        finally:
            self._failure = BusError(reason)
            self._changed.set()
            for state in self._open.values():
                state.news.set()

    def _take(self, received: Received) -> None:
        message, levels = received.message, received.levels
        match message:
            case Presence() if ROLES[message.role].drafts:
                self._online.setdefault(levels["agent"], {})[levels["cluster"]] = message.online
                self._changed.set()
                for state in self._open.values():
                    if state.agent == levels["agent"]:
                        state.news.set()
            case Output():
                asked = self._open.get(message.request)
                here = asked is not None and (asked.cluster, asked.agent) == (levels["cluster"], levels["agent"])
                if asked is not None and here and message.client in (None, self.party.stamp.sender):
                    asked.take(message)

    async def _begin(self, state: OpenRequest, limit_s: float) -> None:
        """Find the agent, wait until it has a place for one more request of this client, and send it the prompt."""
        if state.request in self._open:
            raise ConfigError("request", state.request, "a name that is not in use")
        self._open[state.request] = state
        try:
            state.cluster = await self._find(state.agent, state.cluster, state.request)
            window = self._windows.setdefault((state.cluster, state.agent), asyncio.Semaphore(WINDOW))
            if not await state.enter(window, limit_s):
                why = f"{state.agent} was not asked in time: it has {WINDOW} other requests of this client"
                raise DeadlinePassed(state.agent, state.request, why)
            await self._send(state, limit_s)
        except BaseException:
            self._forget(state)
            raise

    async def _send(self, state: OpenRequest, limit_s: float) -> None:
        left_s = None if limit_s == float("inf") else max(limit_s - now_s(), 0.001)
        patience_ms = None if left_s is None else round(left_s * 1000.0)
        prompt = Prompt(**self.party.stamp(), **state.fields, patience_ms=patience_ms, connection=self._connection)
        sent = await self.party.send(topics.PROMPT_FROM, prompt, expiry_s=left_s, **state.place(prompt.sender))
        if sent.too_large:
            expected = f"a prompt that fits a packet of {self.party.bus.max_packet_bytes} bytes, the broker's largest"
            raise ConfigError("text", f"{len(prompt.text)} characters", expected)
        if not sent:
            raise self._failure or BusError("the outgoing queue is full: the prompt was not sent")
        state.sent = True

    def _forget(self, state: OpenRequest) -> None:
        if self._open.get(state.request) is state:
            del self._open[state.request]
            state.leave()

    async def _withdraw(self, state: OpenRequest) -> None:
        """Forget a request, and cancel it at the agent if its last output has not come."""
        if self._open.get(state.request) is not state:
            return
        self._forget(state)
        if state.sent and state.assembly.last is None:
            message = Cancel(**self.party.stamp(), request=state.request)
            await self.party.send(topics.CANCEL_FROM, message, expiry_s=None, **state.place(message.sender))

    def _abandon(self, state: OpenRequest) -> None:
        """Run `_withdraw` in a task, for callers that cannot await it."""
        if self._open.get(state.request) is state and asyncio.get_running_loop() is self._loop:
            task = self._loop.create_task(self._withdraw(state), name=f"cancel {state.request}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class Answer:
    """An answer as an iterator over its pieces, in order and as they come, for one consumer; `result` has all of them.

    Use it as a context manager if the iteration may be left early: `async with client.ask(...) as answer`.
    """

    def __init__(self, client: Client, state: OpenRequest, *, deadline_s: float | None, patience_s: float) -> None:
        self._client = client
        self._state = state
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._limit_s = float("inf")
        self._hole: tuple[int, float] | None = None  # the position of the missing piece, and since when it is missing
        self._away_s: float | None = None  # since when the agent is offline
        self._begun = False
        self._over = False

    @property
    def request(self) -> str:
        """The name of the request."""
        return self._state.request

    @property
    def agent(self) -> str:
        """The name of the agent."""
        return self._state.agent

    @property
    def result(self) -> Result:
        """The whole answer after the iteration; the part that has arrived before its end and after an error."""
        state = self._state
        return state.assembly.result(agent=state.agent, cluster=state.cluster or "", request=state.request)

    async def whole(self) -> Result:
        """Wait for the remaining pieces and return the whole answer.

        Raises:
            AskError: the answer is not complete; `result` has the part that has arrived.
        """
        async for _ in self:
            pass
        return self.result

    async def begin(self) -> None:
        """Send the prompt now. Otherwise the iteration sends it first.

        Raises:
            AgentOffline: the agent is not online.
            DeadlinePassed: other requests of this client kept the agent busy for the whole time.
            ConfigError: the prompt is larger than the broker accepts, the request's name is in use, or several clusters
                have an agent of this name.
            BusError: the bus is closed, or its queue is full.
        """
        if self._begun:
            return
        self._begun = True
        if self._deadline_s is not None:
            self._limit_s = now_s() + self._deadline_s
        await self._client._begin(self._state, self._limit_s)
        self._state.heard_s = now_s()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        try:
            await self.begin()
            state = self._state
            while True:
                state.news.clear()
                piece = state.assembly.next()
                if piece is not None:
                    return piece
                if state.assembly.last is not None:
                    self._end()
                    failure = failure_of(state.assembly.last, agent=state.agent)
                    if failure is not None:
                        raise failure
                    raise StopAsyncIteration
                if self._over:
                    raise RequestCancelled(state.agent, state.request, f"the request to {state.agent} was cancelled")
                await within(state.news, self._due_s())
        except (AskError, BusError, ConfigError):
            await self.aclose()
            raise

    def _due_s(self) -> float:
        """The loop time until which the next piece may come.

        Raises:
            AskError: this time has passed.
        """
        client, state, at_s = self._client, self._state, now_s()
        hole, agent = state.assembly.hole, state.agent
        if hole is None or self._hole is None or self._hole[0] != hole:
            self._hole = None if hole is None else (hole, at_s)
        if client._places(agent):
            self._away_s = None
        elif self._away_s is None:
            self._away_s = at_s
        limits: list[tuple[float, Callable[[], AskError]]] = [
            (self._limit_s, lambda: self._late(f"not whole within {self._deadline_s:g} s")),
            (state.heard_s + self._patience_s, lambda: self._late(f"silent for {self._patience_s:g} s")),
        ]
        if self._hole is not None:
            position, since_s = self._hole
            limits.append((since_s + client.hole_s, lambda: PiecesLost(agent, state.request, position)))
        if self._away_s is not None:
            gone_s = max(self._away_s, state.heard_s) + client.away_s
            limits.append((gone_s, lambda: AgentOffline(agent, state.request, f"{agent} has gone offline")))
        due_s, failure = min(limits, key=lambda limit: limit[0])
        if at_s >= due_s:
            raise failure()
        if client._failure is not None:
            raise client._failure
        return due_s

    def _late(self, what: str) -> AskError:
        state = self._state
        came = f"{len(self.result.ids)} tokens came"
        return DeadlinePassed(state.agent, state.request, f"the answer of {state.agent} is {what} ({came})")

    def _end(self) -> None:
        self._over = True
        self._client._forget(self._state)

    async def aclose(self) -> None:
        """Cancel the request unless it is over. An iteration that waits in another task raises RequestCancelled."""
        self._over = True
        self._state.news.set()
        await self._client._withdraw(self._state)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        """Cancel the request of an iteration that was left by `break`."""
        if self._begun and not self._over:
            try:
                self._client._abandon(self._state)
            except RuntimeError:  # no loop is running, so the connection is gone as well
                return
