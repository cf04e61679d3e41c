"""What `generation.always_verify` promises of an agent: its rules read the generated text, and only the cloud settles."""

from collections.abc import Sequence
from typing import Any

import pytest

from edge_agent.core import AgentCore
from edge_agent.result import GenerationResult, Job
from fedhlm.config import load
from fedhlm.protocol.messages import Escalation, Hints, Sampling
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.world import Fleet
from tests.edge_agent.test_core import nobody, with_fleet

PROMPT = [5, 6]


def read(ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + one % 26) for one in ids)


def generated(*rules: str, tau: float) -> tuple[GenerationResult, list[Escalation]]:
    """A text under the rules, with a fixed similarity for peers, and the blocks that were sent for it."""
    flags = {
        "generation.tau": str(tau),
        "generation.threshold": "fixed",
        "generation.audit": "0",
        "generation.consensus.adapt": "false",
        "generation.always_verify": str(list(rules)).replace("'", '"'),
    }
    config = load(preset="budget", environ={}, flags=flags).config.generation
    sent: list[Escalation] = []

    async def work(_fleet: Fleet, agent: AgentCore) -> GenerationResult:
        honest = agent.party.send

        async def noted(topic: Any, message: Any, **options: Any) -> Any:
            if isinstance(message, Escalation):
                sent.append(message)
            return await honest(topic, message, **options)

        agent.party.send = noted  # type: ignore[method-assign]
        job = Job(config, Sampling(3), 12, toy.CONTEXT, frozenset())
        return await agent.generate(job, PROMPT, nobody, read=read)

    result, _ = with_fleet(work)
    return result, [block for block in sent if block.ids]


def test_a_rule_reads_the_generated_text_without_the_prompt() -> None:
    result, _ = generated("re:^.", tau=1.0)
    assert result.always_verified() == {"pattern": 1}
    assert result.sources[0] == "cloud"


@pytest.mark.parametrize(("rules", "tau", "for_peers"), [((), 0.0, True), (("re:.",), 1.0, False)])
def test_a_block_with_such_a_draft_is_not_for_peers(rules: tuple[str, ...], tau: float, for_peers: bool) -> None:
    result, blocks = generated(*rules, tau=tau)
    assert blocks
    assert result.similarity is not None
    asks = {isinstance(block.hints, Hints) and block.hints.similarity is not None for block in blocks}
    assert asks == {for_peers}
