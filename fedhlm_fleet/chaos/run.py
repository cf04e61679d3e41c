"""A chaos run: a fleet under load, one fault after the other, and the check of everything that the client heard.

Every part connects to the broker through a proxy; the client connects directly. A fault is injected while an agent that
it concerns is writing. The next fault waits until every agent concerned has recovered.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from fedhlm import choices
from fedhlm import config as configuration
from fedhlm.bus.mqtt import MqttBus
from fedhlm.client import Client
from fedhlm.protocol.roles import EDGE_PREFIX, ROLES
from fedhlm.telemetry import Counters
from fedhlm_fleet.attendance import Place
from fedhlm_fleet.chaos.inject import Injector
from fedhlm_fleet.chaos.invariants import BrokenInvariant, GrowthLimits, RequestStory, fresh, unanswered
from fedhlm_fleet.chaos.observer import NotInTime, Observer, until
from fedhlm_fleet.chaos.oracle import FolderModel, Judgement, checks_of, judge, over_budget
from fedhlm_fleet.chaos.parts import BROKER, BrokerPart, MemoryUse, Parts, module
from fedhlm_fleet.chaos.proxy import Proxy
from fedhlm_fleet.chaos.report import ChaosReport, Recovery
from fedhlm_fleet.chaos.schedule import Fault, Kind, Persistence, schedule
from fedhlm_fleet.demo.asking import Task
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder

READY_S: Final = 90.0
LOAD_S: Final = 60.0
# An unaware side of a half-open link notices it by its keepalive: 30 s of silence, 30 s for the answer to a ping, then
# a backoff. A part notices every other fault by a reset or by ten seconds without an acknowledgement. It finds a broker
# that was away for three seconds within one backoff of at most sixteen seconds.
RECOVERY_S: Final = {"half-open-near": 80.0, "half-open-far": 80.0}
RECOVERY_DEFAULT_S: Final = 40.0
STEADY_S: Final = 20.0  # extra time for a whole request; a token in flight may arrive before the fault is noticed
FRESH_S: Final = 60.0
SAMPLE_S: Final = 0.5

# Memory limits of a part: the ceiling is about twice the memory measured after ten minutes. The growth allows, with a
# margin, for what the allocators of onnxruntime and Python take after the first half minute (docs/chaos.md).
_MB: Final = 1_000_000
LIMITS: Final = {
    "broker": GrowthLimits(100 * _MB, 20 * _MB, 30.0),
    "edge": GrowthLimits(250 * _MB, 40 * _MB, 30.0),
    "cloud": GrowthLimits(1_000 * _MB, 200 * _MB, 30.0),
    "agent": GrowthLimits(500 * _MB, 80 * _MB, 30.0),
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a run, ending after `seconds` or `faults` faults (0: no limit).

    `short`: simple faults only; `only`: faults of these kinds only.
    """

    seconds: float = 600.0
    faults: int = 0
    seed: int = 0
    preset: str = "exact"
    clusters: int = 2
    agents: int = 1
    tokens: int = 48
    persistence: Persistence = "both"
    short: bool = False
    only: tuple[Kind, ...] = ()
    deadline_ms: int = 2_000
    retry_ms: int = 300


Sabotage = Callable[["Chaos"], Awaitable[None]]


class Chaos:
    """One run. `say` gets a line for each event; `sabotage` runs beside the load, to test that the checks notice it.

    The logs of the parts are kept in the folder `logs`.
    """

    def __init__(
        self,
        options: Options,
        *,
        say: Callable[[str], object] = print,
        sabotage: Sabotage | None = None,
        logs: Path | None = None,
    ) -> None:
        self.options = options
        flags = {
            "generation.deadline_ms": str(options.deadline_ms),
            "generation.retry_ms": str(options.retry_ms),
        }
        self.overrides = flags
        self.config = configuration.load(environ={}, preset=options.preset, flags=flags).config
        self.places = [
            Place(f"cluster-{c + 1}", f"agent-{c + 1}{chr(ord('a') + a)}")
            for c in range(options.clusters)
            for a in range(options.agents)
        ]
        self.roles: dict[str, list[str]] = {
            "broker": [BROKER],
            "edge": [f"edge-{c}" for c in dict.fromkeys(p.cluster for p in self.places)],
            "cloud": ["cloud"],
            "agent": [p.agent for p in self.places],
        }
        self.role_of = {name: role for role, names in self.roles.items() for name in names}
        self.checks = checks_of(self.config.generation)
        self.healthy = frozenset(self.checks) - {"unverified"}
        self.observer = Observer(self.places, time.monotonic)
        self.parts = Parts(time.monotonic, lambda name: LIMITS[self.role_of[name]], logs=logs)
        self.broker: BrokerPart
        self.proxies: dict[str, Proxy] = {}
        self.violations: list[BrokenInvariant] = []
        self.recoveries: list[Recovery] = []
        self._say = say
        self._sabotage = sabotage
        self._stopping = False

    async def run(self) -> ChaosReport:
        """Start the fleet, inject faults until the time is over, check the answers, and stop everything.

        Raises:
            FedhlmError: the run cannot begin: mosquitto, the preset or a model is missing.
            NotInTime: the fleet was not ready in time.
        """
        began_s = time.monotonic()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.parts)
            self.broker = BrokerPart(self.parts, persistent=self.options.persistence != "off")
            await self.broker.start()
            for name in self.role_of:
                if name != BROKER:
                    proxy = Proxy("127.0.0.1", self.broker.port)
                    self.proxies[name] = await stack.enter_async_context(proxy)
                    await self._start(name)
            bus = MqttBus(
                self.broker.url,
                client_id="chaos",
                backoff_cap_s=0.2,
                connect_timeout_s=10.0,
                on_link=self.observer.link_changed,
                rng=random.Random(self.options.seed),
            )
            self.counters = Counters()
            client = Client(bus, name="chaos", hear=self.observer.hear, counters=self.counters)
            self.observer.client = await stack.enter_async_context(client)
            await self.observer.subscribe()
            sampler = asyncio.create_task(self._sample(), name="chaos-sample")
            try:
                await self._break(began_s)
            finally:
                sampler.cancel()
                await asyncio.wait([sampler])
            if not sampler.cancelled() and (error := sampler.exception()) is not None:
                raise error
            await self.parts.stop()
            self.violations += self.parts.judged()
            memory = self.parts.memory()
        wall_s = time.monotonic() - began_s
        judgement = await asyncio.to_thread(self._judge)
        if choices.THRESHOLDS[self.config.generation.threshold].keeps_budget:
            self.violations += over_budget(judgement, self.config.generation.budget)
        return self._report(judgement, memory, wall_s)

    async def _start(self, name: str) -> None:
        role = self.role_of[name]
        env = {
            "FEDHLM_BROKER__URL": f"mqtt://127.0.0.1:{self.proxies[name].port}",
            "FEDHLM_PRESET": self.options.preset,
        }
        env |= {configuration.environment_name(key): value for key, value in self.overrides.items()}
        if ROLES[role].drafts:
            cluster = next(p.cluster for p in self.places if p.agent == name)
            env |= {"FEDHLM_CLUSTER__NAME": cluster, "FEDHLM_AGENT__ID": name, "FEDHLM_AGENT__THREADS": "1"}
        elif ROLES[role].relays:
            env |= {"FEDHLM_CLUSTER__NAME": name.removeprefix(EDGE_PREFIX)}
        else:
            env |= {"FEDHLM_CLOUD__THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
        await self.parts.start(name, *module(role), env=env)

    async def _sample(self) -> None:
        while True:
            self.parts.sample()
            await asyncio.sleep(SAMPLE_S)

    # Load

    async def _break(self, began_s: float) -> None:
        await self._until(self.observer.ready, READY_S, "all agents online, all edges linked")
        self._say(
            f"{time.monotonic() - began_s:.1f} s: {len(self.places)} agents, {self.options.clusters} edges, a cloud ready"
        )
        tasks = {place: self._tasks(number) for number, place in enumerate(self.places)}
        working = [
            asyncio.create_task(self._work(place, own), name=f"ask-{place.agent}") for place, own in tasks.items()
        ]
        if self._sabotage is not None:
            working.append(asyncio.create_task(self._spoil(self._sabotage), name="sabotage"))
        try:
            await self._faults(began_s)
            self._stopping = True
            # The waits of each worker have their own limits.
            await asyncio.gather(*working)
        finally:
            self._stopping = True  # also for a worker whose request takes the cancellation for its own end
            for task in working:
                task.cancel()
            await asyncio.wait(working)
        self.violations += unanswered(self.observer.stories.values())
        if not self._ended():
            await self._ask_afresh(tasks)

    async def _spoil(self, sabotage: Sabotage) -> None:
        await sabotage(self)

    def _ended(self) -> bool:
        """Whether a part has ended unexpectedly, after which the run cannot go on."""
        return bool(self.parts.violations)

    def _tasks(self, number: int) -> Iterator[Task]:
        """Yield endless requests for one agent, half of them at temperature 0."""
        rng = random.Random(f"tasks {self.options.seed} {number}")
        titles = [item.title for item in load_items()]
        while True:
            temperature = rng.choice((0.0, None))
            yield Task("continue", rng.choice(titles) + "\n", "", self.options.tokens, temperature, rng.getrandbits(32))

    async def _work(self, place: Place, tasks: Iterator[Task]) -> None:
        for task in tasks:
            while not self._stopping and not self._ended():
                await self.observer.present(place.agent)
                story = await self._ask(place, task)
                await self.observer.settled(story)
                if story.finish is not None:
                    break
            else:
                return

    async def _ask(self, place: Place, task: Task) -> RequestStory:
        sampling = self.config.generation.sampling(task.seed, temperature=task.temperature)
        return await self.observer.ask(place, task, sampling)

    # Faults

    async def _faults(self, began_s: float) -> None:
        until_s = began_s + self.options.seconds
        faults = schedule(
            self.options.seed,
            self.roles,
            persistence=self.options.persistence,
            short=self.options.short,
            only=self.options.only,
        )
        injector = Injector(
            observer=self.observer,
            parts=self.parts,
            broker=self.broker,
            proxies=self.proxies,
            role_of=self.role_of,
        )
        for fault in faults:
            enough = self.options.faults and fault.number >= self.options.faults
            if enough or time.monotonic() >= until_s or self._ended():
                return
            concerned = injector.concerned(fault)
            try:
                await self._until(partial(self.observer.writing, concerned), LOAD_S, f"{sorted(concerned)} writing")
            except NotInTime as exc:
                self.violations.append(BrokenInvariant("recovery", "load", str(exc)))
                return
            await injector.inject(fault)
            healed_s = time.monotonic()
            recovery_s = await self._recover(fault, concerned, healed_s)
            became = "not recovered" if recovery_s is None else f"recovered in {recovery_s:.2f} s"
            self._say(
                f"{time.monotonic() - began_s:.1f} s: fault {fault.number}, {fault.name} of {', '.join(fault.targets)}, "
                f"{fault.hold_s:g} s; {became}"
            )

    async def _recover(self, fault: Fault, concerned: set[str], healed_s: float) -> float | None:
        """Wait for a steady state, and return the seconds until all agents concerned had a token from the cloud.

        None: the fleet did not recover in time.
        """
        who = ", ".join(sorted(concerned))
        within_s = RECOVERY_S.get(fault.kind, RECOVERY_DEFAULT_S)
        try:
            took_s = await self._until(
                partial(self._served, concerned, healed_s), within_s, f"tokens from the cloud for {who}"
            )
            now_s = time.monotonic()
            await self._until(partial(self._steady, concerned, now_s), within_s + STEADY_S, f"a healthy text for {who}")
        except NotInTime as exc:
            self.violations.append(BrokenInvariant("recovery", fault.name, str(exc)))
            return None
        self.recoveries.append(Recovery(fault.name, took_s, time.monotonic() - healed_s))
        return took_s

    async def _until(self, holds: Callable[[], bool], within_s: float, what: str) -> float:
        """Wait like `until`, but return at once when the run cannot go on."""
        return await until(lambda: self._ended() or holds(), within_s, what)

    def _steady(self, agents: set[str], since_s: float) -> bool:
        return all(self.observer.steady(agent, since_s, self.healthy) for agent in agents)

    def _served(self, agents: set[str], since_s: float) -> bool:
        # If few tokens are verified, a text without unverified tokens is as good a sign.
        return all(
            self.observer.cloud_token_s.get(agent, 0.0) > since_s or self.observer.steady(agent, since_s, self.healthy)
            for agent in agents
        )

    # The end

    async def _ask_afresh(self, tasks: dict[Place, Iterator[Task]]) -> None:
        try:
            await until(self.observer.ready, READY_S, "all agents online, all edges linked after the last fault")
            stories = [await self._ask(place, next(own)) for place, own in tasks.items()]
            await until(lambda: not any(s.open for s in stories), FRESH_S, "fresh requests answered")
        except NotInTime as exc:
            self.violations.append(BrokenInvariant("not recovered", "fleet", str(exc)))
        else:
            self.violations += fresh(stories, self.healthy)

    def _judge(self) -> Judgement:
        llm = FolderModel(model_folder(self.config.cloud.model, "llm"), threads=0, steps=False)
        agent = self.config.agent
        slm = FolderModel(model_folder(agent.model, "slm"), threads=0, steps=True, target=agent.target_tokenizer)
        return judge(self.observer.stories.values(), {"llm": llm, "slm": slm}, self.checks)

    def _report(self, judgement: Judgement, memory: dict[str, MemoryUse], wall_s: float) -> ChaosReport:
        stories = list(self.observer.stories.values())
        found = [*self.violations, *(v for story in stories for v in story.violations), *judgement.violations]
        if refused := self.counters["refused_messages"]:
            found.append(
                BrokenInvariant("malformed", "client", f"{refused} messages that do not belong to their topic")
            )
        return ChaosReport.of(
            options=msgspec.to_builtins(self.options),
            stories=stories,
            recoveries=self.recoveries,
            judgement=judgement,
            memory=memory,
            violations=found,
            wall_s=wall_s,
            strangers=self.observer.strangers,
        )
