"""The simulator is a model of the fleet and not of itself: on the same seeds, real services over a real broker and the
same parts in virtual time commit the same tokens, settled by the same parties, with the same escalations.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Final, NamedTuple

import pytest

import edge_agent.__main__ as agent_main
from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.party import Stamp
from fedhlm.config import load, presets
from fedhlm.decoding.decoder import Decoder
from fedhlm.process.runtime import Runtime
from fedhlm_lab.sim.shipped import shipped_pair
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair
from fedhlm_lab.studies.compare import StudyTask, tasks_of, work
from fedhlm_zoo.corpus import TOPIC_LINE
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder
from tests.integration.live import Live, live

SEED: Final = 1
AGENT: Final = "porch"
CLUSTER: Final = "c0"
TITLES: Final = 4
TOKENS: Final = 16
TEMPERATURE: Final = 0.8
ANSWER_S: Final = 60.0

# Rounds are out of reach: they come by the clock, and what a round brings would come at another token in virtual time.
# A busy machine must not look like a lost message, so nothing is asked for twice.
FROZEN: Final = {
    "generation.learning.round_tokens": "1000000000",
    "generation.learning.round_s": "86400",
    "federation.round_s": "86400",
    "generation.deadline_ms": "120000",
    "generation.retry_ms": "120000",
}
# Without rounds `budget` has little evidence, and verifies nearly everything. With a threshold of its own it keeps tokens,
# asks what the cloud has settled before (one vote is enough), and audits every text.
FIXED: Final = FROZEN | {
    "generation.threshold": "fixed",
    "generation.tau": "0.6",
    "generation.audit": "1.0",
    "generation.consensus.votes": "1",
}
# Numbers take more bytes from 256 on; the live agent has numbered its presence and outputs as well. From here to 65,535
# all take the same, so that bytes can be compared.
NUMBERED: Final = 256
# `exact` drafts on while verdicts are under way: how much goes up in one block, and what is drafted in vain, depend on how
# fast the machine is; the promise is that its text does not. It comes last, so that what is learnt from its drafts
# touches nobody.
TIMED: Final = "exact"
BLOCKING: Final = tuple(sorted(set(presets()) - {TIMED}))


class Answer(NamedTuple):
    """One request's outcome; `figures` are its statistics without the time that it took."""

    ids: list[int]
    sources: list[str]
    figures: dict[str, float]


Answers = dict[str, list[Answer]]  # by preset


def untimed(statistics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in statistics.items() if name != "wall_s"}


def decided(answer: Answer) -> Answer:
    """What the agent decided. When the answer to an audit comes, before or after the end of a text, is the bus's."""
    figures = {name: value for name, value in answer.figures.items() if "risk" not in name}
    return answer._replace(figures=figures)


class Worn(Runtime):
    """The process of a party that has sent NUMBERED messages before."""

    def stamp(self, sender: str) -> Stamp:
        return worn(super().stamp(sender))


def worn(stamp: Stamp) -> Stamp:
    for _ in range(NUMBERED):
        stamp()
    return stamp


def tasks(decoder: Decoder, temperature: float) -> list[tuple[str, StudyTask]]:
    """Titles to continue and a topic to name, as text for the bus and as tasks of the simulator."""
    items = load_items()
    continued = tasks_of(items[:TITLES], "continue", decoder, tokens=TOKENS, temperature=temperature)
    asked = tasks_of(items[:1], "topic", decoder, tokens=TOKENS, temperature=temperature)
    texts = [item.title + "\n" for item in items[:TITLES]] + [items[0].body + TOPIC_LINE]
    return list(zip(texts, continued + asked, strict=True))


async def ask(system: Live, preset: str, number: int, text: str, task: StudyTask) -> Answer:
    answer = await system.ask(
        text,
        name=AGENT,
        cluster=CLUSTER,
        preset=preset,
        max_tokens=task.max_tokens,
        seed=task.sampling.seed,
        temperature=task.sampling.temperature,
        request=f"{preset}-{number}",
    )
    return Answer(list(answer.ids), [str(s) for s in answer.sources], untimed(answer.statistics))


async def over_mqtt(names: tuple[str, ...], flags: dict[str, str], asked: list[tuple[str, StudyTask]]) -> Answers:
    """The real services, one after the other under each preset."""
    settings: dict[str, object] = {**flags, "cluster.name": CLUSTER, "agent.presets": ",".join(names)}
    async with EmbeddedBroker() as broker, live(broker.url, parts=("edge", "cloud", AGENT), flags=settings) as system:
        return {name: [await ask(system, name, number, *one) for number, one in enumerate(asked)] for name in names}


def reader(decoder: Decoder) -> Callable[[Sequence[int]], str]:
    """How an agent's service reads ids for the rules of `generation.always_verify`."""
    return lambda ids: str(decoder.tokenizer.decode(list(ids), skip_special_tokens=False))


async def in_virtual_time(
    pair: Pair, decoder: Decoder, names: tuple[str, ...], flags: dict[str, str], wanted: list[StudyTask]
) -> Answers:
    """The same requests of the same agent in a calm fleet."""
    federation = load(environ={}, flags=flags).config.federation
    fleet = Fleet(pair, seed=SEED, clusters=1, delay_s=0.02, sessions_max=64, federation=federation)
    answers = Answers()
    for node in fleet.nodes.values():
        node.start()
    await asyncio.sleep(1.0)
    async with fleet.online(CLUSTER, AGENT, pair.drafter()) as agent:
        await asyncio.sleep(1.0)
        worn(agent.party.stamp)
        for name in names:
            config = load(preset=name, environ={}, flags=flags).config
            done = [
                d.result for d in await work(agent, config, iter(wanted), pair.eos_ids, pair.context, reader(decoder))
            ]
            answers[name] = [Answer(r.ids, r.sources, untimed(r.statistics())) for r in done]
    for node in fleet.nodes.values():
        await node.crash()
    return answers


def both(
    names: tuple[str, ...], flags: dict[str, str], *, times: int = 1, temperature: float = TEMPERATURE
) -> tuple[Answers, Answers]:
    """What live services and simulator answered, by preset, when they were asked the same so many times."""
    slm, llm = model_folder("", "slm"), model_folder("", "llm")
    decoder = Decoder.load(slm, threads=1)
    asked = times * tasks(decoder, temperature)
    pair = shipped_pair(slm, llm)
    with pytest.MonkeyPatch.context() as patch:
        # The same session numbers and as long sequence numbers as in the simulator.
        sessions = random.Random(f"{SEED}/{AGENT}/sessions")
        numbers = SimpleNamespace(getrandbits=lambda _bits: sessions.getrandbits(63))
        patch.setattr(agent_main, "random", SimpleNamespace(SystemRandom=lambda: numbers))
        patch.setattr(agent_main, "Runtime", Worn)
        lived = asyncio.run(over_mqtt(names, flags, asked))
        simulation = in_virtual_time(pair, decoder, names, flags, [task for _, task in asked])
        simulated = run_virtual(simulation)
    return lived, simulated


@pytest.fixture(scope="module")
def frozen() -> tuple[Answers, Answers]:
    """All presets, live and simulated, before the first federated round."""
    return both((*BLOCKING, TIMED), FROZEN)


@pytest.mark.parametrize("preset", BLOCKING)
def test_live_and_simulator_agree_in_every_token_message_and_byte(frozen: tuple[Answers, Answers], preset: str) -> None:
    lived, simulated = frozen
    assert len(lived[preset][-1].ids) == 1  # a topic is one token
    assert lived[preset] == simulated[preset]


def test_live_and_simulator_agree_in_the_text_where_drafts_run_ahead(frozen: tuple[Answers, Answers]) -> None:
    lived, simulated = ([answer[:2] for answer in side[TIMED]] for side in frozen)
    assert {source for _, sources in lived for source in sources} == {"cloud"}
    assert lived == simulated


def test_the_presets_do_what_their_gates_say(frozen: tuple[Answers, Answers]) -> None:
    """Agreement says nothing where nothing is decided: some presets both keep and escalate."""
    lived, _ = frozen
    settled = {name: [s for a in answers for s in a.sources] for name, answers in lived.items()}
    for name in ("cu-hlm", "fedhlm", "rand-hlm", "u-hlm"):
        assert {"local", "cloud"} <= set(settled[name]), name
    assert set(settled["slm-only"]) == {"local"}
    for name in ("exact", "hlm", "llm-only", "speculative"):
        assert set(settled[name]) == {"cloud"}, name


def test_budget_keeps_asks_and_audits_the_same_tokens_under_a_fixed_threshold() -> None:
    # The edge learns from greedy sessions, whose tokens are the LLM's argmax.
    lived, simulated = both(("budget",), FIXED, times=2, temperature=0.0)
    first, again = lived["budget"][: TITLES + 1], lived["budget"][TITLES + 1 :]
    assert {"local", "cloud"} <= {s for answer in first for s in answer.sources}
    assert {"local", "peer"} <= {s for answer in again for s in answer.sources}
    accounted = [a.figures["risk_texts"] for a in first + again]
    assert accounted == sorted(accounted)
    assert accounted[-1] > 0.0, "audits ride in the messages of later texts, so texts are accounted for"
    assert [decided(answer) for answer in first + again] == [decided(answer) for answer in simulated["budget"]]
