"""The observer of a chaos run: asks through the client, and hears every output over its connection straight to the broker.

It keeps a Story for each request, and asks again under a new name where a fault may have lost the prompt or the answer.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Final

from fedhlm.bus.party import Received
from fedhlm.client import Answer, Client
from fedhlm.errors import AskError, FedhlmError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output, Presence, Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm_fleet.chaos.invariants import Disturbances, RequestStory
from fedhlm_fleet.demo.asking import Place, Task

LOOK_S: Final = 0.02
ANSWER_S: Final = 60.0  # an undisturbed request, on a slow machine, with a queue of repeated ones before it
PATIENCE_S: Final = 2.5  # with a disturbed one: a little longer than the deadline, after which a device goes on alone
_READY_AGAIN_S: Final = 5.0


class NotInTime(FedhlmError):
    """A condition did not hold within its time; the message says which."""


async def until(holds: Callable[[], bool], within_s: float, what: str) -> float:
    """Seconds until a condition held.

    Raises:
        NotInTime: it did not within `within_s`.
    """
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise NotInTime(f"not within {within_s:g} s: {what}")
        await asyncio.sleep(LOOK_S)  # some conditions are about time, which has no event
    return time.monotonic() - began


class Observer:
    """`clock_s` is monotonic. The caller sets `client`, which has `hear`, and its bus `link_changed`, as its hook."""

    def __init__(self, places: list[Place], clock_s: Callable[[], float]) -> None:
        self.places = places
        self.stories: dict[str, RequestStory] = {}
        self.disturbances = Disturbances()
        self.online: set[str] = set()
        self.linked: set[str] = set()
        self.cloud_token_s: dict[str, float] = {}
        self.strangers = 0
        self._torn_since: float | None = None
        self._clock_s = clock_s
        self._numbers = itertools.count()
        self._answers: dict[str, Answer] = {}
        self.client: Client  # set by who makes it, before anything is asked

    def link_changed(self, up: bool) -> None:
        """Without a link nothing is known of anybody."""
        if not up:
            self.online.clear()
            self.linked.clear()

    async def subscribe(self) -> None:
        """Hear who is there, and every output."""
        root = self.client.party.root
        await self.client.subscribe(
            topics.AGENT_STATUS.name(root, cluster="+", agent="+"),
            topics.EDGE_STATUS.name(root, cluster="+"),
            topics.OUTPUT.name(root, cluster="+", agent="+", client="+"),
        )

    def hear(self, received: Received) -> None:
        """Take in what the client hears."""
        match received.message:
            case Presence(role="agent") as state:
                (self.online.add if state.online else self.online.discard)(received.levels["agent"])
            case Presence(role="edge") as state:
                linked = state.online and state.upstream is not None
                (self.linked.add if linked else self.linked.discard)(received.levels["cluster"])
            case Output() as output:
                self.take(output, received.levels["agent"])

    def take(self, output: Output, agent: str) -> None:
        """Hear one output."""
        story = self.stories.get(output.request)
        if story is None or story.agent != agent:
            self.strangers += 1
            return
        now_s = self._clock_s()
        new = story.take(output, now_s, may_miss=self._broker_died_since(story.asked_s))
        self.disturbances.heard(agent, now_s)
        if any(SOURCES[token.source].verified for token in new):
            self.cloud_token_s[agent] = now_s

    def broker_died(self) -> None:
        """What the broker held in memory is lost; outputs of requests asked until now may have holes."""
        self._torn_since = self._clock_s()

    def broker_is_back(self) -> None:
        """Call when it listens again."""
        self._torn_since = self._clock_s()

    def agent_died(self, agent: str) -> None:
        """Its requests are lost, and it is not there, whatever the broker still says."""
        self.online.discard(agent)
        for story in self.stories.values():
            if story.agent == agent:
                story.agent_killed = True
                if story.open:
                    story.given_up = "its agent was killed"

    def _broker_died_since(self, asked_s: float) -> bool:
        return self._torn_since is not None and self._torn_since >= asked_s

    def ready(self) -> bool:
        """Every agent is online and every edge sees the cloud."""
        return {p.agent for p in self.places} <= self.online and {p.cluster for p in self.places} <= self.linked

    def steady(self, agent: str, since_s: float, healthy: frozenset[str]) -> bool:
        """Whether the agent has answered a request, asked since then, with tokens of these sources alone."""
        return any(
            s.agent == agent and s.asked_s > since_s and s.finish is not None and not s.torn and s.only_from(healthy)
            for s in self.stories.values()
        )

    def writing(self, agents: set[str]) -> bool:
        """Whether one of these agents is in the middle of an answer."""
        return any(s.agent in agents and s.open and s.tokens for s in self.stories.values())

    async def ask(self, place: Place, task: Task, *, top_p: float, coupling: str, temperature: float) -> RequestStory:
        """Send one prompt."""
        own = temperature if task.temperature is None else task.temperature
        request = f"r{next(self._numbers)}"
        story = RequestStory(
            request=request,
            agent=place.agent,
            prompt=task.text,
            sampling=Sampling(task.seed, own, top_p, coupling),
            max_tokens=task.tokens,
            asked_s=self._clock_s(),
        )
        self.stories[request] = story
        answer = self._answers[request] = self.client.ask(
            place.agent,
            task.text,
            cluster=place.cluster,
            max_tokens=task.tokens,
            seed=task.seed,
            temperature=own,
            request=request,
        )
        try:
            await answer.begin()
        except AskError as exc:
            story.given_up = str(exc)
        return story

    async def settled(self, story: RequestStory) -> None:
        """Return when a story is answered, or given up for a reason; one that has no reason stays open after ANSWER_S."""

        def over() -> bool:
            now_s = self._clock_s()
            if story.open and now_s - story.last_s > PATIENCE_S and self.disturbances.since(story.agent, story.asked_s):
                story.given_up = "a fault may have lost it"
            return not story.open or now_s - story.asked_s > ANSWER_S

        await until(over, ANSWER_S + PATIENCE_S, f"{story.request} settled")
        # One that was given up is cancelled by this.
        await self._answers.pop(story.request).aclose()

    async def present(self, agent: str) -> None:
        """Wait a moment for an agent to be online; after that it is worth asking all the same."""
        try:
            await until(lambda: agent in self.online, _READY_AGAIN_S, f"{agent} online")
        except NotInTime:
            return
