"""A fleet of toy models in virtual time that serves prompts from the bus, a tap on '#', and a spy on what the machines really did."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from edge_agent import core as agent_module
from edge_agent.events import Action, Answered, Commit, Committed, Escalate, Event, Judged
from edge_agent.generation import GenerationMachine
from edge_agent.service import ModelFacts
from fedhlm.bus.interface import Delivery
from fedhlm.bus.journal import JournalWriter
from fedhlm.bus.party import Party
from fedhlm.config import Loaded, load
from fedhlm.process.runtime import Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output, Prompt
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.parts import Part
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import WALL_S, Fleet
from fedhlm_traces.file import Header, Record, direction_of

DELAY_S = 0.01
AGENTS = (("c0", "ann"), ("c0", "bob"), ("c1", "cid"))


@dataclass
class Fact:
    """What a machine did for one committed token; times are the agent's."""

    token: Committed
    judged: Judged | None
    asked_s: float | None
    answered_s: float | None


@dataclass
class Deed:
    """One generation of one agent."""

    prompt: tuple[int, ...]
    tau: float
    facts: list[Fact] = field(default_factory=list)
    rollbacks: int = 0


class Spy(GenerationMachine):
    """A machine that notes what it does. Its notes share nothing with journals or messages."""

    deeds: list[Deed]

    def start(self, now: float) -> list[Action]:
        self.deed = Deed(tuple(self.context), self.plan.tau)
        self.deeds.append(self.deed)
        self.spied_judged: dict[int, Judged] = {}
        self.spied_carried: dict[int, float] = {}
        self.spied_asked_s: dict[tuple[int, int], float] = {}
        return self.spied(super().start(now), None, now)

    def handle(self, event: Event, now: float) -> list[Action]:
        return self.spied(super().handle(event, now), event, now)

    def spied(self, actions: list[Action], event: Event | None, now: float) -> list[Action]:
        first = True
        for action in actions:
            match action:
                case Judged():
                    self.spied_judged[action.position] = action
                case Commit(tokens):
                    # The first commit after an answer is the answer's; what follows needed none.
                    answer = (
                        event if first and isinstance(event, Answered) and tokens[0].source == event.source else None
                    )
                    self.spied_commit(tokens, answer, now)
                    first = False
                case Escalate():
                    self.spied_asked_s.setdefault((action.epoch, action.base), now)
                    for position in range(action.base + action.fixed, action.base + len(action.ids)):
                        self.spied_carried.setdefault(position, now)
        return actions

    def spied_commit(self, tokens: list[Committed], answer: Answered | None, now: float) -> None:
        for token in tokens:
            position = self.prompt_length + len(self.deed.facts)
            judged, carried_s = self.spied_judged.pop(position, None), self.spied_carried.pop(position, None)
            asked_s = None
            if answer is not None:
                block_s = self.spied_asked_s[answer.epoch, answer.base]
                asked_s = block_s if carried_s is None else min(block_s, carried_s)
            self.deed.facts.append(Fact(token, judged, asked_s, None if answer is None else now))
            if judged is not None and judged.token != token.token:  # a rollback: nothing drafted after it counts
                self.deed.rollbacks += 1
                self.spied_judged.clear()
                self.spied_carried.clear()


@contextmanager
def spying() -> Iterator[list[Deed]]:
    """Every generation inside the block is noted."""
    deeds: list[Deed] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spy, "deeds", deeds, raising=False)
        patch.setattr(agent_module, "GenerationMachine", Spy)
        yield deeds


def tokenizer() -> Tokenizer:
    """Words that are numbers, one for each token of the toy models."""
    made = Tokenizer(models.WordLevel({str(i): i for i in range(toy.VOCAB_SIZE)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


class Told:
    """One run: the recording that a tap made, and what happened, by prompt's text."""

    def __init__(self, records: list[Record], deeds: list[Deed]) -> None:
        self.records = records
        self.deeds = {" ".join(map(str, deed.prompt)): deed for deed in deeds}
        self.header = Header(created_ms=round(WALL_S * 1000), source="simulator", filters=("#",))


class Journalled(Fleet):
    """A fleet whose agents may keep journals."""

    journal = False

    def runtime(self, part: Part | None = None) -> Runtime:
        runtime = super().runtime(part)
        kept = self.journal and part is not None and part.name in {name for _, name in AGENTS}
        return runtime._replace(journal=JournalWriter(7, runtime.clock_s)) if kept else runtime


async def _serve(fleet: Fleet, loaded: Loaded, cluster: str, name: str) -> None:
    numbers = iter(range(1_000 * (1 + sum(map(ord, name))), 2**31))
    facts = ModelFacts(tokenizer(), None, frozenset({toy.EOS_ID}), toy.CONTEXT)
    drafter = toy.ToyDrafter(agreement=0.7)
    _, service = fleet.agent_service(Part(name), loaded, cluster, drafter, facts, lambda: next(numbers))
    await service.subscribe()
    async with service.connection:
        await service.run()


async def _tap(fleet: Fleet, records: list[Record], done: dict[str, asyncio.Event], party: Party) -> None:
    async for delivery in party.bus.deliveries():
        records.append(_record(delivery))
        found = topics.lookup(delivery.topic)
        if found is not None and found[0] is topics.OUTPUT:
            message = topics.decode_for(topics.OUTPUT, delivery.payload)
            if isinstance(message, Output) and message.finish is not None:
                done[message.request].set()


def _record(delivery: Delivery) -> Record:
    now_s = asyncio.get_running_loop().time()
    direction = direction_of(delivery.topic)
    wall_ms = round((WALL_S + now_s) * 1000)
    return Record(now_s, wall_ms, delivery.topic, delivery.payload, 1, delivery.retain, direction)


async def _run(fleet: Fleet, loaded: Loaded, prompts: int, *, faults: dict[str, Any]) -> list[Record]:
    records: list[Record] = []
    done = {f"r-{name}-{n}": asyncio.Event() for _, name in AGENTS for n in range(prompts)}
    async with fleet.bus("tap") as tap, asyncio.TaskGroup() as group:
        fleet.link("tap").delay_s = 0.0
        party = fleet.party(tap, "client")
        await tap.subscribe("#")
        tasks = [group.create_task(_tap(fleet, records, done, party))]
        for node in fleet.nodes.values():
            node.start()
        tasks += [group.create_task(_serve(fleet, loaded, cluster, name)) for cluster, name in AGENTS]
        await asyncio.sleep(1.0)
        for _, name in AGENTS:
            for fault, value in faults.items():
                setattr(fleet.link(name), fault, value)
        for cluster, name in AGENTS:
            for n in range(prompts):
                prompt = Prompt(
                    **party.stamp(),
                    request=f"r-{name}-{n}",
                    text=f"{1 + n} {2 + n} {sum(map(ord, name)) % 40}",
                    max_tokens=20,
                    seed=n,
                )
                await party.send(topics.PROMPT, prompt, cluster=cluster, agent=name)
        if faults:
            await asyncio.sleep(60.0)  # an output may be lost, so nothing else says that all is over
        else:
            await asyncio.gather(*(event.wait() for event in done.values()))
        await asyncio.sleep(2.0)
        for task in tasks:
            task.cancel()
        for node in fleet.nodes.values():
            await node.crash()
    return records


def told(
    preset: str,
    seed: int,
    *,
    prompts: int = 3,
    journal: bool = False,
    sessions_max: int = 8,
    faults: dict[str, Any] | None = None,
) -> Told:
    """Run a fleet under a preset; with few sessions its cloud forgets them all the time. `faults` are set on the agents' links once all are online."""
    flags = {"generation.retry_ms": "500", "generation.deadline_ms": "20000", "generation.temperature": "0.8"}
    loaded = load(preset=preset, environ={}, flags=flags)
    with spying() as deeds:
        fleet = Journalled(toy.pair(0.7), seed=seed, clusters=2, delay_s=DELAY_S, sessions_max=sessions_max)
        fleet.journal = journal
        records = run_virtual(_run(fleet, loaded, prompts, faults=faults or {}))
    return Told(records, deeds)
