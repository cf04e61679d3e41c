"""Whether a token is kept follows from what was known before it, never from what the LLM says of it or of later ones.

The certificate rests on this (docs/budget.md). Each test runs two worlds, whose LLMs agree before one position of the
text and disagree from there on. An agent that looked ahead would keep the token there in one world only.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cloud_verifier.engine import Engine, EngineInput, EngineOutput
from edge_agent.events import Committed
from edge_agent.result import GenerationResult, Job
from fedhlm.config import load
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from tests.edge_agent.machine import Bench, plan
from tests.edge_agent.test_generation import PROMPT, shake, steps

TOKENS: Final = 12
DRAFTING: Final = ("async", "blocking", "tree")
ASKED: Final = (7, 8, 9)
TEACHING: Final = 4  # texts that come before, from which memories and thresholds learn


def turned(ids: Sequence[int]) -> NDArray[np.float64]:
    """The logits of an LLM that nearly always disagrees with the toy LLM; the end of text is as likely."""
    row = toy.large_logits(ids)
    return np.concatenate([row[:1], np.roll(row[1:], 7)])


def kept(sources: Sequence[str], ids: Sequence[int]) -> list[int | None]:
    """The kept token at each position of the text; None where the LLM has settled it."""
    return [None if SOURCES[source].verified else token for token, source in zip(ids, sources, strict=True)]


@pytest.mark.parametrize("kind", DRAFTING)
@given(
    gate=st.sampled_from(["threshold", "random"]),
    schedule=steps,
    seed=st.integers(0, 1_000),
    turn=st.integers(0, TOKENS - 1),
    deadline_s=st.sampled_from([1.5, 1e6]),
)
@settings(max_examples=100)
def test_machines_keep_a_token_whatever_the_llm_says_from_there_on(
    kind: str, gate: str, schedule: list[tuple[str, int]], seed: int, turn: int, deadline_s: float
) -> None:
    """Messages are late, lost, doubled and overtaken in both worlds alike."""

    def turning(ids: Sequence[int]) -> NDArray[np.float64]:
        return turned(ids) if len(ids) >= len(PROMPT) + turn else toy.large_logits(ids)

    worlds = []
    for logits in (toy.large_logits, turning):
        made = plan(kind, gate=gate, seed=seed, tokens=TOKENS, deadline_s=deadline_s)
        bench = Bench(made, PROMPT, logits=logits)
        shake(bench, schedule)
        bench.run()
        worlds.append(bench)
    one, other = worlds
    assert one.committed[:turn] == other.committed[:turn]
    decided = [kept([c.source for c in bench.committed], bench.ids)[: turn + 1] for bench in worlds]
    assert decided[0] == decided[1]


async def nobody(_tokens: list[Committed]) -> FinishReason | None:
    return None


async def _asked(flags: dict[str, str], turn: int, *, late: bool) -> GenerationResult:
    """What an agent writes beside an LLM that turns at `turn`, after its fleet has written texts of the same prompt.

    If `late`, another agent wrote them, and only the edge remembers.
    """
    turns = False

    def logits(ids: Sequence[int]) -> NDArray[np.float64]:
        ahead = turns and len(ids) >= len(ASKED) + turn
        return turned(ids) if ahead else toy.large_logits(ids)

    async def forward(requests: Sequence[EngineInput]) -> list[EngineOutput]:
        # It takes no time. Otherwise a verdict would come sooner or later with what it says.
        outputs = []
        for cache, new, wanted in requests:
            ids = [*cache.ids, *new]
            rows = [logits(ids[:end]) for end in range(len(ids) - wanted + 1, len(ids) + 1)]
            outputs.append(EngineOutput(np.reshape(rows, (wanted, toy.VOCAB_SIZE)), toy.ToyCache(tuple(ids))))
        return outputs

    models = toy.pair(0.7)._replace(engine=lambda: Engine(toy.ToyCache(), forward, toy.TOKEN_BYTES))
    generation = load(preset="budget", environ={}, flags=flags).config.generation
    fleet = Fleet(models, seed=3, clusters=1, delay_s=0.01, sessions_max=8)

    def job(seed: int) -> Job:
        sampling = Sampling(seed, 0.0, 1.0, generation.coupling)
        return Job(generation, sampling, TOKENS, toy.CONTEXT, frozenset())

    for node in fleet.nodes.values():
        node.start()
    await asyncio.sleep(1.0)
    async with fleet.online("c0", "first", models.drafter()) as first:
        for seed in range(TEACHING):
            await first.generate(job(seed), list(ASKED), nobody)
            await asyncio.sleep(0.5)
        async with fleet.online("c0", "second", models.drafter()) as second:
            await asyncio.sleep(0.5)
            turns = True
            result = await (second if late else first).generate(job(0), list(ASKED), nobody)
    for node in fleet.nodes.values():
        await node.crash()
    return result


@pytest.mark.parametrize(
    ("kind", "peers", "deadline_ms"),
    [
        ("async", "none", 5_000),
        ("async", "centroid", 100),  # shorter than the first round trip
        ("async", "neighbour", 5_000),
        ("async", "neighbour at the edge", 5_000),
        ("blocking", "none", 100),
        ("blocking", "neighbour", 5_000),
        ("blocking", "neighbour at the edge", 5_000),
        ("tree", "none", 80),  # some verdicts come too late
    ],
)
def test_agents_keep_a_token_whatever_the_llm_says_from_there_on(kind: str, peers: str, deadline_ms: int) -> None:
    """Whole fleets: peers, the edge's memory, bonus tokens, trees, and links that are given up."""
    rule, _, edge = peers.partition(" ")
    flags = {
        "generation.pipeline.kind": kind,
        "generation.pipeline.block": "4",
        "generation.peers": rule,
        "generation.deadline_ms": str(deadline_ms),
        "generation.gate": "always" if kind == "tree" else "threshold",
        "generation.threshold": "fixed",
        "generation.tau": "0.65",
        "generation.consensus.adapt": "false",
        "generation.consensus.votes": "1",
    }

    def world(turn: int) -> list[int | None]:
        result = run_virtual(_asked(flags, turn, late=bool(edge)))
        assert len(result.ids) == TOKENS
        return kept(result.sources, result.ids)

    whole = world(TOKENS)
    assert set(whole) - {None}, "some tokens must be kept, or nothing is tested"
    for turn in range(TOKENS):
        assert world(turn)[: turn + 1] == whole[: turn + 1]
