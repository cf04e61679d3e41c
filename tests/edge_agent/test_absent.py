"""Where presence says that nobody answers, a text does not wait to find out; it is verified again when somebody does."""

import asyncio
import logging
import re
import sys
from typing import Any

import pytest

from edge_agent.core import AgentCore
from edge_agent.events import Committed
from edge_agent.result import GenerationResult, Job
from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.party import Stamp, presence
from fedhlm.config import load
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.world import Fleet
from tests.edge_agent.test_core import nobody, with_fleet

DEADLINE_S = 5.0


def job(**flags: str) -> Job:
    flags = {"generation.deadline_ms": str(round(DEADLINE_S * 1000)), **flags}
    config = load(preset="exact", environ={}, flags=flags).config.generation
    return Job(config, Sampling(seed=3), 16, toy.CONTEXT, frozenset({toy.EOS_ID}))


def edge(**options: Any) -> Any:
    return presence(Stamp("edge-c0"), "edge", **{"online": True, **options})


async def timed(agent: AgentCore, wanted: Job) -> tuple[float, GenerationResult]:
    """How long the first token took, in seconds, and what came of the text."""
    now_s = asyncio.get_running_loop().time
    began_s, came_s = now_s(), list[float]()

    async def note(_tokens: object) -> FinishReason | None:
        came_s.append(now_s() - began_s)
        return None

    result = await agent.generate(wanted, [5], note)
    return came_s[0], result


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (edge(online=False), "the edge of cluster c0 is offline"),
        (edge(), "the edge of cluster c0 sees no cloud"),
    ],
)
def test_text_goes_on_at_once_and_the_log_says_who_is_missing(
    state: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(fleet: Fleet, agent: AgentCore) -> GenerationResult:
        for node in fleet.nodes.values():
            await node.crash()
        agent.on_edge(state)
        agent.on_edge(state)
        wait_s, _ = await timed(agent, job(**{"generation.wait_offline": "true"}))
        assert wait_s >= DEADLINE_S, "who wants to wait, waits"
        agent.link_up = True  # as if it had not found out
        wait_s, result = await timed(agent, job())
        assert wait_s < 0.5
        return result

    with caplog.at_level(logging.WARNING):
        result, _ = with_fleet(work)
    assert set(result.sources) == {"unverified"}
    assert [record.getMessage() for record in caplog.records].count(
        f"{words}: what it should verify is marked unverified until it does"
    ) == 1  # fmt: skip


@pytest.mark.parametrize(("wait", "least_s", "most_s"), [("false", 0.5, 1.5), ("true", DEADLINE_S, 2 * DEADLINE_S)])
def test_a_running_text_goes_on_at_once_as_well_unless_it_is_to_wait(wait: str, least_s: float, most_s: float) -> None:
    async def work(fleet: Fleet, agent: AgentCore) -> GenerationResult:
        for node in fleet.nodes.values():
            await node.crash()
        await asyncio.sleep(1.0)  # last wills have come
        agent.on_edge(edge(upstream=toy.FINGERPRINT))
        asyncio.get_running_loop().call_later(0.5, agent.on_edge, edge(online=False))
        wait_s, result = await timed(agent, job(**{"generation.wait_offline": wait}))
        assert least_s <= wait_s < most_s
        assert set(result.sources) == {"unverified"}
        return result

    with_fleet(work)


def test_a_text_that_is_to_wait_is_the_same_whatever_presence_says_meanwhile() -> None:
    """Presence comes between its events; each token is still committed once, and is the one that the cloud settled."""

    async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
        committed: list[Committed] = []

        async def note(tokens: list[Committed]) -> FinishReason | None:
            committed.extend(tokens)
            for _ in range(2):
                agent.on_edge(edge(online=False))
            return None

        result = await agent.generate(job(**{"generation.wait_offline": "true"}), [5], note)
        assert [token.token for token in committed] == result.ids
        return result

    result, _ = with_fleet(work)
    assert result.ids == toy.large_alone([5], Sampling(seed=3), 16)
    assert set(result.sources) == {"cloud"}


async def test_the_command_line_marks_what_nobody_verified_and_says_who_is_missing() -> None:
    async with EmbeddedBroker() as broker:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fedhlm_fleet.cli", "agent", "--preset", "exact", "--broker.url", broker.url,
            "--generation.max_tokens", "8", "--prompt", "Oil prices rise",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, said = await asyncio.wait_for(process.communicate(), 120.0)
    assert process.returncode == 0
    assert re.fullmatch(r"\[unverified: .+\]\n", out.decode(), re.DOTALL), out
    assert "no edge has announced itself in cluster" in said.decode()
    assert "nobody has verified 8 of 8 tokens" in said.decode()


def test_a_fleet_that_comes_back_verifies_again() -> None:
    async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
        agent.on_edge(edge(online=False))
        agent.on_edge(edge(upstream=toy.FINGERPRINT))
        return await agent.generate(job(), [5], nobody)

    result, agent = with_fleet(work)
    assert set(result.sources) == {"cloud"}
    assert agent.absent == ""


def test_a_verdict_of_the_cloud_says_more_than_old_presence() -> None:
    async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
        agent.on_edge(edge())
        await agent.generate(job(), [5], nobody)  # its probes are answered, for the cloud is there
        return await agent.generate(job(), [5, 6], nobody)

    result, agent = with_fleet(work)
    assert set(result.sources) == {"cloud"}
    assert agent.absent == ""


def test_where_no_edge_ever_was_that_is_said_after_a_look_around(caplog: pytest.LogCaptureFixture) -> None:
    async def work(fleet: Fleet, agent: AgentCore) -> GenerationResult:
        del fleet
        await agent.look_around(3.0)  # it is told
        assert agent.absent == ""
        agent._looked.clear()
        began_s = asyncio.get_running_loop().time()
        await agent.look_around(3.0)
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(3.0)
        return GenerationResult()

    _, agent = with_fleet(work)
    assert agent.absent == "no edge has announced itself in cluster c0"
    assert "no edge has announced itself" in caplog.text
