"""The observer of a chaos run: sends requests with the client, and hears every output directly from the broker.

It keeps a RequestStory for each request, and gives one up when a fault may have lost the prompt or the answer.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from fedhlm.bus.party import Received, Stamp
from fedhlm.client import Answer, Client
from fedhlm.errors import AskError, FedhlmError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Contribution, Output, Presence, Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm_fleet.attendance import Attendance, Place
from fedhlm_fleet.chaos.invariants import Disturbances, RequestStory
from fedhlm_fleet.demo.asking import Task
from fedhlm_lab.sim.liars import false_contribution

LOOK_S: Final = 0.02
ANSWER_S: Final = 60.0  # for an undisturbed request on a slow machine, behind a queue of repeated ones
PATIENCE_S: Final = 2.5  # for a disturbed request: a little longer than the deadline after which a device goes on alone
LIES_FROM: Final = 10_000  # an honest agent does not reach this round in a run, and a leap to it is taken
_READY_AGAIN_S: Final = 5.0


class NotInTime(FedhlmError):
    """A condition did not become true in time; the message names it."""


async def until(holds: Callable[[], bool], within_s: float, what: str) -> float:
    """Wait until a condition holds, and return how many seconds that took.

    Raises:
        NotInTime: the condition did not hold within `within_s` seconds.
    """
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise NotInTime(f"not within {within_s:g} s: {what}")
        await asyncio.sleep(LOOK_S)  # polling, because some conditions depend on the time
    return time.monotonic() - began


class Observer:
    """Observes a fleet. `clock_s` is monotonic.

    The caller sets `client`. It installs `hear` as the client's hook, and `link_changed` as the hook of the client's
    bus.
    """

    def __init__(self, places: list[Place], clock_s: Callable[[], float]) -> None:
        self.places = places
        self.stories: dict[str, RequestStory] = {}
        self.disturbances = Disturbances()
        self.attendance = Attendance()
        self.cloud_token_s: dict[str, float] = {}
        self.strangers = 0
        self.contributions: dict[str, Contribution] = {}  # the latest honest one of each agent
        self._lying: dict[str, Stamp] = {}
        self._torn_since: float | None = None
        self._clock_s = clock_s
        self._numbers = itertools.count()
        self._answers: dict[str, Answer] = {}
        self.client: Client  # set by the caller before the first request

    def link_changed(self, up: bool) -> None:
        """Forget which parts are online when the link is lost."""
        if not up:
            self.attendance.forget()

    async def subscribe(self) -> None:
        """Subscribe to the presence of agents and edges, and to every output."""
        root = self.client.party.root
        await self.client.subscribe(
            *self.attendance.filters(root),
            topics.OUTPUT.name(root, cluster="+", agent="+", client="+"),
            topics.FL_UPDATE.name(root, cluster="+", agent="+"),
        )

    def hear(self, received: Received) -> None:
        """Take in a message that the client receives."""
        match received.message:
            case Presence() as state:
                self.attendance.hear(state, received.levels)
            case Output() as output:
                self.take(output, received.levels["agent"])
            case Contribution() as contribution if contribution.round < LIES_FROM:
                self.contributions[received.levels["agent"]] = contribution

    def take(self, output: Output, agent: str) -> None:
        """Take in one output."""
        story = self.stories.get(output.request)
        if story is None or story.agent != agent:
            self.strangers += 1
            return
        now_s = self._clock_s()
        new = story.take(output, now_s, may_miss=self._broker_died_since(story.asked_s))
        self.disturbances.heard(agent, now_s)
        if any(SOURCES[token.source].verified for token in new):
            self.cloud_token_s[agent] = now_s

    async def lie(self, agent: str, name: str, number: int) -> None:
        """Send a false contribution in the name of an agent. `name` is a key of LIES."""
        place = next(place for place in self.places if place.agent == agent)
        stamp = self._lying.setdefault(agent, Stamp(agent))
        message = false_contribution(self.contributions.get(agent), name, number, stamp())
        message = replace(message, round=message.round + LIES_FROM)
        await self.client.party.send(topics.FL_UPDATE, message, cluster=place.cluster, agent=agent)

    def broker_died(self) -> None:
        """Note that the broker's memory is lost: requests sent before now may have holes in their outputs."""
        self._torn_since = self._clock_s()

    def broker_is_back(self) -> None:
        """Note that the broker accepts connections again."""
        self._torn_since = self._clock_s()

    def agent_died(self, agent: str) -> None:
        """Give up an agent's requests, and count it as offline, whatever the broker's retained messages say."""
        self.attendance.agents.discard(agent)
        for story in self.stories.values():
            if story.agent == agent:
                story.agent_killed = True
                if story.open:
                    story.given_up = "its agent was killed"

    def _broker_died_since(self, asked_s: float) -> bool:
        return self._torn_since is not None and self._torn_since >= asked_s

    def ready(self) -> bool:
        """Return whether every agent is online and every edge sees the cloud."""
        return self.attendance.complete(self.places)

    def steady(self, agent: str, since_s: float, healthy: frozenset[str]) -> bool:
        """Return whether the agent has answered a request sent after `since_s` with tokens of these sources only."""
        return any(
            s.agent == agent and s.asked_s > since_s and s.finish is not None and not s.torn and s.only_from(healthy)
            for s in self.stories.values()
        )

    def writing(self, agents: set[str]) -> bool:
        """Return whether one of these agents is in the middle of an answer."""
        return any(s.agent in agents and s.open and s.tokens for s in self.stories.values())

    async def ask(self, place: Place, task: Task, sampling: Sampling) -> RequestStory:
        """Send one request. `sampling` is that with which the agent will serve it."""
        request = f"r{next(self._numbers)}"
        story = RequestStory(
            request=request,
            agent=place.agent,
            prompt=task.text,
            sampling=sampling,
            max_tokens=task.tokens,
            asked_s=self._clock_s(),
        )
        self.stories[request] = story
        answer = self._answers[request] = self.client.ask(
            place.agent,
            task.text,
            cluster=place.cluster,
            max_tokens=task.tokens,
            seed=sampling.seed,
            temperature=sampling.temperature,
            request=request,
        )
        try:
            await answer.begin()
        except AskError as exc:
            story.given_up = str(exc)
        return story

    async def settled(self, story: RequestStory) -> None:
        """Wait until a request is finished or given up, or until ANSWER_S, after which it stays open."""

        def over() -> bool:
            now_s = self._clock_s()
            if story.open and now_s - story.last_s > PATIENCE_S and self.disturbances.since(story.agent, story.asked_s):
                story.given_up = "a fault may have lost it"
            return not story.open or now_s - story.asked_s > ANSWER_S

        await until(over, ANSWER_S + PATIENCE_S, f"{story.request} settled")
        # This cancels a request that was given up.
        await self._answers.pop(story.request).aclose()

    async def present(self, agent: str) -> None:
        """Wait some seconds for an agent to be online; return in any case, since asking may still help."""
        try:
            await until(lambda: agent in self.attendance.agents, _READY_AGAIN_S, f"{agent} online")
        except NotInTime:
            return
