"""Simulate a whole fleet in virtual time: real agents, edges and cloud on toy models and a faulty loopback network.

`simulate` is a function of its scenario. A client asks every agent over the bus, and asks again if no answer comes.
After the faults the fleet must come to rest and answer at once; Violation names the invariant that failed.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Final

import msgspec

from edge_agent.service import AgentService, ModelFacts
from fedhlm.bus.party import Stamp
from fedhlm.client import Client
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import Presence
from fedhlm.protocol.roles import ROLES
from fedhlm.protocol.sources import SOURCES
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.faults import Weather
from fedhlm_lab.sim.invariants import Monitor, Violation, WatchedAgent, idle, presence_topics
from fedhlm_lab.sim.liars import tempt
from fedhlm_lab.sim.link import Direction
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import Packet
from fedhlm_lab.sim.parts import Part, PartBus
from fedhlm_lab.sim.patience import Patient, ScriptedRequest
from fedhlm_lab.sim.scenario import CLIENT, STEP_S, Scenario
from fedhlm_lab.sim.virtual import VirtualTimeError, run_virtual
from fedhlm_lab.sim.world import Fleet

KEEPALIVE_S: Final = 1.5
WATCH_S: Final = 1.0
SESSIONS_MAX: Final = 3  # fewer than the agents, so that sessions are primed again all the time
COUNTERS: Final = ("rollbacks", "reprimes", "retries", "refused_messages", "dropped_messages", "assignments")
Tap = Callable[[str, Packet], None]

__all__ = ["RunTotals", "Scenario", "Simulation", "Violation", "simulate"]


class RunTotals(msgspec.Struct):
    """Totals of one run; `texts` are the answers that the client got."""

    tokens: Counter[str]
    faults: Counter[str]
    counters: Counter[str]
    texts: list[list[int]]
    messages: int
    virtual_s: float

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks."""
        return self.counters["rollbacks"]

    @property
    def reprimes(self) -> int:
        """Number of sessions primed again."""
        return self.counters["reprimes"]


class Simulation:
    """One run. `tap` sees every message."""

    def __init__(self, scenario: Scenario, *, tap: Tap | None = None) -> None:
        self.scenario = scenario
        self.fleet = Fleet(
            toy.pair(scenario.agreement),
            seed=scenario.seed,
            clusters=scenario.clusters,
            delay_s=0.0,
            sessions_max=SESSIONS_MAX,
            keeps=True,
        )
        self.fleet.broker.keepalive_s = KEEPALIVE_S
        # Each has its own stream, so removing a fault changes as little as possible elsewhere.
        self.fleet.broker.stream = lru_cache(maxsize=None)(partial(_stream, scenario.seed))
        self.drafter = toy.ToyDrafter(agreement=scenario.agreement)
        self.monitor = Monitor(scenario, self.drafter)
        self.agents = [(scenario.cluster_of(i), name) for i, name in enumerate(scenario.agent_names())]
        for cluster, name in self.agents:
            self.fleet.nodes[name] = Part(name, partial(self._agent, cluster))
        self.parts = list(self.fleet.nodes.values())
        for client in (*scenario.targets().links, CLIENT):
            scenario.profile_of(client).apply(self.fleet.link(client))
        self.weather = Weather(
            self.fleet.broker,
            parts=self.fleet.nodes,
            link=self.fleet.link,
            links=scenario.targets().links,
            profile_of=scenario.profile_of,
        )
        self.texts: list[list[int]] = []
        self._unanswered: set[str] = set()
        self._relayed: set[str] = set()  # edges that verdicts passed in calm weather
        self._tap = tap

    def _agent(self, cluster: str, part: Part) -> tuple[list[PartBus], AgentService]:
        """One life of an agent, as its command would start it."""
        numbers = random.Random(f"{self.scenario.seed}/{part.name}/{part.lives}")
        facts = ModelFacts(toy.ToyTokenizer(), None, frozenset({toy.EOS_ID}), toy.CONTEXT)
        return self.fleet.agent_service(
            part,
            self.scenario.loaded,
            cluster,
            self.drafter,
            facts,
            new_session=lambda: numbers.getrandbits(63),
            kind=partial(_watched, self.monitor, part),
        )

    async def run(self) -> RunTotals:
        """Run from the start of all parts to the fleet at rest.

        Raises:
            Violation: an invariant does not hold.
        """
        self.fleet.broker.tap = self._see
        for part in self.parts:
            part.start()
        bus = LoopbackBus(self.fleet.broker, client_id=CLIENT, link=self.fleet.link(CLIENT))
        stamp = Stamp(CLIENT, self.fleet.wall_s)
        patience_s, counted = self.patience_s, self.fleet.counters
        asking = Client(bus, stamp=stamp, counters=counted, away_s=patience_s, hole_s=patience_s)
        async with asking:
            client = Patient(asking, patience_s=patience_s, seeds=self.monitor.seeds)
            tasks = [
                asyncio.create_task(self._watch(), name="watch"),
                work := asyncio.create_task(self._work(client), name="work"),
            ]
            try:
                await asyncio.wait([work, self.monitor.failed], return_when=asyncio.FIRST_COMPLETED)
                if self.monitor.failed.done():
                    await self.monitor.failed
                await work
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                self.monitor.failed.cancel()
        virtual_s = asyncio.get_running_loop().time()
        for part in self.parts:
            await part.crash()
        network = self.fleet.broker.faults
        counters = Counter({name: round(counted[name]) for name in COUNTERS})
        counters["asked_again"] = client.asked_again
        counters["lost"] = network.lost + network.partition_lost + network.cut
        counters["duplicated"], counters["reordered"] = network.duplicated, network.reordered
        return RunTotals(
            tokens=self.monitor.tokens,
            faults=self.weather.injected,
            counters=counters,
            texts=self.texts,
            messages=self.monitor.messages,
            virtual_s=virtual_s,
        )

    @property
    def patience_s(self) -> float:
        """How long the client waits for news before it asks again, in seconds."""
        return 3.0 * max(1.0, self.scenario.round_trip_s)

    @property
    def answer_s(self) -> float:
        """Longest time of a request without faults: the slowest retry, and a round trip for each token."""
        scenario = self.scenario
        return 30.0 + 16.0 * scenario.retry_s + 4.0 * scenario.tokens * (scenario.round_trip_s + STEP_S)

    @property
    def rest_s(self) -> float:
        """Time after the last fault or token until the fleet is quiet."""
        return self.fleet.broker.keepalive_s + 5.0 + 10.0 * self.scenario.round_trip_s

    def _see(self, sender: str, packet: Packet) -> None:
        self.monitor.see(packet)
        if self._tap is not None:
            self._tap(sender, packet)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self.monitor.check_parts(self.parts)

    async def _work(self, client: Patient) -> None:
        loop = asyncio.get_running_loop()
        weather = asyncio.create_task(self.weather.unfold(self.scenario.schedule), name="weather")
        lives = [self._ask_all(client, cluster, name) for cluster, name in self.agents]
        # Each agent has its prompts, including those asked again, and one more at the end.
        limit_s = self.scenario.calm_s + 4.0 * (self.scenario.prompts + 1) * self.answer_s
        try:
            async with asyncio.timeout_at(limit_s):
                await asyncio.gather(weather, *lives)
        except TimeoutError:
            late = ", ".join(sorted(self._unanswered))
            self.monitor.fail("ends", f"not answered within {limit_s:.0f} s: {late}")
            return
        if self.scenario.schedule:
            await asyncio.sleep(max(0.0, self.scenario.calm_s - loop.time()))
        await self._rest()
        await asyncio.gather(*(self._ask_last(client, cluster, name) for cluster, name in self.agents))
        await asyncio.sleep(self.rest_s)
        self._check_presence()
        self.monitor.check_parts(self.parts)
        self.monitor.check_budget(liars={e.target for e in self.scenario.schedule if e.kind == "liar"})
        for part in self.parts:
            for bound in idle(part):
                if bound.size:
                    self.monitor.fail("steady", f"{bound.what} of {part.name} at rest must be empty (got {bound.size})")

    async def _ask_all(self, client: Patient, cluster: str, name: str) -> None:
        rng = random.Random(f"{self.scenario.seed}/{name}")
        for number in range(self.scenario.prompts):
            await asyncio.sleep(rng.uniform(0.0, 0.5 * self.scenario.calm_s / self.scenario.prompts))
            prompt = [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(rng.randrange(1, 6))]
            await self._ask(client, ScriptedRequest(cluster, name, f"{name}-{number}", prompt, rng.getrandbits(40)))

    async def _ask(self, client: Patient, request: ScriptedRequest, patience_s: float | None = None) -> int:
        """Ask until it is answered; return the number of attempts."""
        scenario = self.scenario
        self._unanswered.add(request.name)
        answer, attempts = await client.ask(
            request, max_tokens=scenario.tokens, temperature=scenario.temperature, patience_s=patience_s
        )
        self._unanswered.remove(request.name)
        known = self.monitor.attempts[request.seed]
        if not any(attempt.over and tuple(attempt.ids) == answer.ids for attempt in known):
            self.monitor.fail("output", f"{request.agent} answered {answer.ids}, and committed something else")
        if answer.text != toy.ToyTokenizer().decode(answer.ids):
            self.monitor.fail("output", f"{request.agent} wrote {answer.text!r} for {answer.ids}")
        self.texts.append(list(answer.ids))
        return attempts

    async def _rest(self) -> None:
        """Let abandoned requests end, and all parts find one another again."""
        limit_s = asyncio.get_running_loop().time() + 16.0 * self.answer_s
        while any(b.size for part in self.parts for b in idle(part) if b.what in ("prompts", "generations")):
            if asyncio.get_running_loop().time() > limit_s:
                self.monitor.fail("ends", "a request that was asked for again never ended")
                return
            await asyncio.sleep(WATCH_S)
        await asyncio.sleep(self.rest_s)

    def _check_presence(self) -> None:
        retained = self.fleet.broker.retained
        places = [(self._home(name, cluster), name) for cluster, name in self.agents]
        for topic in presence_topics(places, self.scenario.clusters):
            state = decode(retained[topic].payload) if topic in retained else None
            if not isinstance(state, Presence) or not state.online:
                self.monitor.fail("steady", f"after the faults {topic} says {state}")
            elif ROLES[state.role].relays and state.upstream is None and state.sender in self._relayed:
                self.monitor.fail("steady", f"after the faults {state.sender} does not see the cloud")

    def _home(self, name: str, born: str) -> str:
        service = self.fleet.nodes[name].service
        return service.agent.cluster if isinstance(service, AgentService) else born

    async def _ask_last(self, client: Patient, cluster: str, name: str) -> None:
        """Send every agent one more prompt without faults: it must be answered at once, and by the cloud where due."""
        began_s = asyncio.get_running_loop().time()
        rng = random.Random(f"{self.scenario.seed}/{name}/last")
        request = ScriptedRequest(
            cluster, name, f"{name}-last", [rng.randrange(1, toy.VOCAB_SIZE)], rng.getrandbits(40)
        )
        attempts = await self._ask(client, request, self.answer_s)
        took_s = asyncio.get_running_loop().time() - began_s
        if attempts > 1 or took_s > self.answer_s:
            self.monitor.fail(
                "steady",
                f"{name} must be answered at once, within {self.answer_s:.0f} s (got {attempts} attempts, {took_s:.1f} s)",
            )
        sources = self.monitor.attempts[request.seed][-1].sources
        if any(SOURCES[source].verified for source in sources):
            self._relayed.add(f"edge-{self._home(name, cluster)}")
        unverified = sum(SOURCES[source].unreachable for source in sources)
        if unverified and self.scenario.deadline_s >= self.answer_s:
            self.monitor.fail("steady", f"{name} left {unverified} tokens unverified without any fault")


def _watched(monitor: Monitor, part: Part, **named: object) -> WatchedAgent:
    agent = WatchedAgent(**named)  # type: ignore[arg-type]
    tempt(agent.learner, lambda: part.lie)
    agent.monitor = monitor
    return agent


def _stream(seed: int, client: str, direction: Direction) -> random.Random:
    return random.Random(f"{seed}/{client}/{direction}")


async def _run(scenario: Scenario, tap: Tap | None) -> RunTotals:
    return await Simulation(scenario, tap=tap).run()


def simulate(scenario: Scenario, *, tap: Tap | None = None) -> RunTotals:
    """Run a scenario; `tap` sees every message.

    Raises:
        Violation: an invariant does not hold.
        ConfigError: the scenario's preset or settings cannot be used.
    """
    try:
        return run_virtual(_run(scenario, tap))
    except VirtualTimeError as exc:
        raise Violation("alive", f"the fleet came to a standstill: {exc}", float("nan")) from exc
