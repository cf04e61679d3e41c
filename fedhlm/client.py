"""Ask an agent from Python: the only client there is.

    async with fedhlm.Client("mqtt://127.0.0.1") as client:
        async for piece in client.ask("porch", "Oil prices rise"):
            print(piece.text, end="", flush=True)

A client is one connection to one broker. It may ask any number of agents at the same time.
"""

# Client and Answer are two sides of one thing.
# ruff: noqa: SLF001

import asyncio
import random
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from fedhlm.answers import Assembly, Piece, Result, failure_of
from fedhlm.bus.identity import client_id
from fedhlm.bus.interface import Bus
from fedhlm.bus.own_name import own_name
from fedhlm.bus.party import Party, Received, Stamp
from fedhlm.errors import (
    AgentOffline,
    AskError,
    BusError,
    ConfigError,
    DeadlinePassed,
    PiecesLost,
    RequestCancelled,
)
from fedhlm.protocol import prompts, topics
from fedhlm.protocol.messages import Cancel, Output, Presence, Prompt
from fedhlm.settings import Broker
from fedhlm.telemetry import Counters

NAME: Final = "client"
AWAY_S: Final = 5.0
HOLE_S: Final = 5.0
PATIENCE_S: Final = 120.0
_DEADLINE_MAX_S: Final = 1e9
_MOVE_S: Final = 1.0  # while an agent moves, it is in two clusters
_NAME_BYTES: Final = 48  # of a name that gets a number behind it
_HEARD: Final = (topics.AGENT_STATUS, topics.OUTPUT)


class Client:
    """Asks agents over one broker.

    `bus` is a URL (`mqtts://host`), a broker section of the settings (certificates, passwords), or a bus that is not
    entered yet. Without `cluster` an agent is looked for in all clusters. `root` are the first levels of all topics.

    `name` is the sender of all prompts, to whom the answers go; with a certificate or a user's name it is that. The broker knows a client of ours by this name and a random number.
    `away_s`: how long an agent may be offline before that is an error, in seconds; `hole_s`: how long a missing piece may
    still come after later ones. `hear` is called with every message, those included that are nobody's answer, of what
    `subscribe` asks for besides. Time is the running loop's.

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
        if isinstance(bus, str):
            bus = Broker(url=bus)
        if isinstance(bus, Broker):
            from fedhlm.process.run import address_of, bus_of  # brings the MQTT library along

            # Answers go to the sender of the prompt, and the broker lets us hear those to the name that it knows us by.
            name = own_name(address_of(bus)) or name
            root = root or bus.root
            # No two clients may have one id: the second would throw out the first.
            identity = client_id("client", name, _number(), root=root)
            bus = bus_of(bus, client_id=identity, connect_timeout_s=bus.connect_timeout_s)
        if cluster is not None:
            prompts.check("cluster", cluster)
        prompts.check("agent", name)
        self.cluster = cluster
        self.away_s = away_s
        self.hole_s = hole_s
        self.party = Party(
            bus=bus, stamp=stamp or Stamp(name), counters=counters or Counters(), root=root or topics.DEFAULT_ROOT
        )
        self._hear = hear
        self._prefix = f"{name[:_NAME_BYTES]}-{_number()}"
        self._asked = 0
        self._open: dict[str, _Open] = {}
        self._online: dict[str, dict[str, bool]] = {}  # agent -> cluster -> whether it is there
        self._changed = asyncio.Event()
        self._heard_of: set[str] = set()
        self._failure: BusError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            BusError: the broker is not reached in time, or refuses.
        """
        self._loop = asyncio.get_running_loop()
        await self.party.bus.__aenter__()
        self._reader = asyncio.create_task(self._read(), name=f"client {self.party.stamp.sender}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what is open, and disconnect."""
        for state in list(self._open.values()):
            await self._withdraw(state)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._reader.cancel()
        await asyncio.wait([self._reader])
        await self.party.bus.__aexit__(None, None, None)
        if error is None and not self._reader.cancelled() and (broken := self._reader.exception()) is not None:
            raise broken  # of `hear`

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
        stop: tuple[str, ...] = (),
        preset: str | None = None,
        deadline_s: float | None = None,
        patience_s: float = PATIENCE_S,
        request: str | None = None,
    ) -> "Answer":
        """An answer to come: iterate over its pieces, or await `whole`. It is asked for when that begins.

        None leaves a choice to the agent's configuration. `deadline_s` is for the whole answer, `patience_s` for the time
        without any news of it. `request` names it; by default the client finds a name that nobody else uses.
        Leaving the iteration early, or `aclose`, cancels the request.

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
            "stop": tuple(stop),
            "preset": preset,
            "patience_ms": None if deadline_s is None else round(deadline_s * 1000.0),
        }
        fields["request"] = request or f"{self._prefix}-{self._asked}"
        place = {"agent": agent} if cluster is None else {"agent": agent, "cluster": cluster}
        for key, value in (place | fields).items():
            prompts.check(key, value)
        state = _Open(agent, cluster or self.cluster, fields)
        return Answer(self, state, deadline_s=deadline_s, patience_s=patience_s)

    async def write(self, agent: str, text: str, **options: Any) -> Result:
        """The whole answer; `options` are those of `ask`.

        Raises:
            AskError: it did not come whole.
        """
        async with self.ask(agent, text, **options) as answer:
            return await answer.whole()

    async def subscribe(self, *filters: str) -> None:
        """Hear these topics as well.

        Raises:
            BusError: the broker refuses a filter.
        """
        await self.party.bus.subscribe(*filters)

    async def find(self, agent: str, cluster: str | None = None) -> str:
        """The cluster in which an agent is online now.

        Raises:
            AgentOffline: it is not, and did not come within `away_s`.
            ConfigError: there are agents of this name in several clusters.
            BusError: the bus was closed, or the broker refuses to show who is there.
        """
        return await self._find(agent, cluster or self.cluster, "")

    async def _find(self, agent: str, cluster: str | None, request: str) -> str:
        await self._watch(agent, cluster)
        began_s = _now_s()
        while True:
            places = self._places(agent)
            # One that has moved still serves where it was, which its presence there tells.
            if cluster is not None and places and cluster in self._online[agent]:
                return cluster
            if cluster is None and len(places) == 1:
                return places[0]
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            several = cluster is None and bool(places)
            if not await _within(self._changed, began_s + (_MOVE_S if several else self.away_s)):
                named = ", ".join(places)
                if several:
                    raise ConfigError("cluster", None, f"one of {named}, where {agent} is online")
                where = "any cluster" if cluster is None else f"cluster {cluster}"
                found = f" (it is in {named})" if named else ""
                raise AgentOffline(agent, request, f"{agent} is not online in {where} at this broker{found}")

    async def _watch(self, agent: str, cluster: str | None) -> None:
        if agent in self._heard_of:
            return
        root, bus, me = self.party.root, self.party.bus, self.party.stamp.sender
        try:
            await bus.subscribe(*(row.name(root, cluster="+", agent=agent, client=me) for row in _HEARD))
        except BusError:  # a broker that shows a client its own cluster only
            if cluster is None:
                raise
            await bus.subscribe(*(row.name(root, cluster=cluster, agent=agent, client=me) for row in _HEARD))
        self._heard_of.add(agent)

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
            case Presence(role="agent"):
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

    async def _begin(self, state: "_Open") -> None:
        """Find the agent and send it the prompt."""
        if state.request in self._open:
            raise ConfigError("request", state.request, "a name that is not in use")
        state.cluster = await self._find(state.agent, state.cluster, state.request)
        prompt = Prompt(**self.party.stamp(), **state.fields)
        self._open[state.request] = state
        expiry_s = None if prompt.patience_ms is None else prompt.patience_ms / 1000.0
        place = {"cluster": state.cluster, "agent": state.agent}
        sent = await self.party.send(topics.PROMPT, prompt, expiry_s=expiry_s, **place)
        if sent.too_large:
            self._forget(state)
            expected = f"a prompt that fits a packet of {self.party.bus.max_packet_bytes} bytes, the broker's largest"
            raise ConfigError("text", f"{len(prompt.text)} characters", expected)
        if not sent:
            self._forget(state)
            raise self._failure or BusError("the outgoing queue is full: the prompt was not sent")

    def _forget(self, state: "_Open") -> None:
        if self._open.get(state.request) is state:
            del self._open[state.request]

    async def _withdraw(self, state: "_Open") -> None:
        """Forget a request, and tell the agent if it may still be writing."""
        if self._open.get(state.request) is not state:
            return
        self._forget(state)
        if state.assembly.last is None and state.cluster is not None:
            message = Cancel(**self.party.stamp(), request=state.request)
            await self.party.send(topics.CANCEL, message, cluster=state.cluster, agent=state.agent)

    def _abandon(self, state: "_Open") -> None:
        """`_withdraw` where nobody can wait for it."""
        if self._open.get(state.request) is state and asyncio.get_running_loop() is self._loop:
            task = self._loop.create_task(self._withdraw(state), name=f"cancel {state.request}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


class _Open:
    """A request on its way."""

    def __init__(self, agent: str, cluster: str | None, fields: dict[str, Any]) -> None:
        self.agent = agent
        self.cluster = cluster
        self.request: str = fields["request"]
        self.fields = fields
        self.assembly = Assembly()
        self.news = asyncio.Event()
        self.heard_s = 0.0

    def take(self, output: Output) -> None:
        if self.assembly.take(output):
            self.heard_s = _now_s()
            self.news.set()


class Answer:
    """The pieces of one answer as they come, in order; then `result`. One consumer.

    Use it as a context manager where the iteration may be left early: `async with client.ask(...) as answer`.
    """

    def __init__(self, client: Client, state: _Open, *, deadline_s: float | None, patience_s: float) -> None:
        self._client = client
        self._state = state
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._limit_s = float("inf")
        self._hole: tuple[int, float] | None = None  # what is missing, and since when
        self._away_s: float | None = None  # since when the agent is offline
        self._begun = False
        self._over = False

    @property
    def request(self) -> str:
        """The request's name."""
        return self._state.request

    @property
    def agent(self) -> str:
        """Who is asked."""
        return self._state.agent

    @property
    def result(self) -> Result:
        """What is there: the whole answer after the iteration, a part of it before or after an error."""
        state = self._state
        return state.assembly.result(agent=state.agent, cluster=state.cluster or "", request=state.request)

    async def whole(self) -> Result:
        """Wait for all pieces that are left.

        Raises:
            AskError: the answer did not come whole; `result` has what did.
        """
        async for _ in self:
            pass
        return self.result

    async def begin(self) -> None:
        """Send the prompt now, which else the iteration does first.

        Raises:
            AgentOffline: the agent is not there.
            ConfigError: the prompt cannot travel, or there are several agents of this name.
            BusError: the bus is closed, or its queue full.
        """
        if self._begun:
            return
        self._begun = True
        began_s = _now_s()
        await self._client._begin(self._state)
        self._state.heard_s = _now_s()
        if self._deadline_s is not None:
            self._limit_s = began_s + self._deadline_s

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
                await _within(state.news, self._due_s())
        except (AskError, BusError, ConfigError):
            await self.aclose()
            raise

    def _due_s(self) -> float:
        """Until when news may come.

        Raises:
            AskError: it is too late for them.
        """
        client, state, now_s = self._client, self._state, _now_s()
        hole, agent = state.assembly.hole, state.agent
        if hole is None or self._hole is None or self._hole[0] != hole:
            self._hole = None if hole is None else (hole, now_s)
        if client._places(agent):
            self._away_s = None
        elif self._away_s is None:
            self._away_s = now_s
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
        if now_s >= due_s:
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
        """Cancel the request, unless it is over; an iteration that waits in another task ends with RequestCancelled."""
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
        """An iteration that was left by `break` cancels as well."""
        if self._begun and not self._over:
            try:
                self._client._abandon(self._state)
            except RuntimeError:  # no loop runs any more, and the connection is gone with it
                return


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def _within(event: asyncio.Event, limit_s: float) -> bool:
    """Wait for an event until a time of the loop's clock; whether it came."""
    try:
        async with asyncio.timeout_at(None if limit_s == float("inf") else limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _number() -> str:
    return f"{random.SystemRandom().getrandbits(40):010x}"
