"""Texts that an agent writes, timed as the client on its device sees them; the bus may be real or simulated."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from edge_agent.core import AgentCore
from edge_agent.events import Committed
from edge_agent.result import Job
from fedhlm.config import load
from fedhlm.learning.certificate import Certificate
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Config

# Everything is waited for, however slow the link is: a preset does what it promises, and its time says what that costs.
PATIENT: Final = {
    "generation.deadline_ms": "3600000",
    "generation.retry_ms": "3600000",
    "generation.wait_offline": "true",
}


class TimedText(NamedTuple):
    """A text: the prompt's ids, its own, who settled each, the seconds to the first token and to the end."""

    prompt: list[int]
    ids: list[int]
    sources: list[str]
    first_s: float
    seconds: float
    certificate: Certificate | None = None


async def timed_text(agent: AgentCore, job: Job, prompt: list[int]) -> TimedText:
    """Have an agent write one text."""
    clock_s = asyncio.get_running_loop().time
    began_s, times = clock_s(), list[float]()

    async def saw(_tokens: list[Committed]) -> FinishReason | None:
        times.append(clock_s() - began_s)
        return None

    result = await agent.generate(job, prompt, saw)
    return TimedText(prompt, list(result.ids), list(result.sources), times[0], clock_s() - began_s, result.certificate)


class TextOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Texts to write under a preset with some settings: prompts in ids; text i has the seed `seed` + i.

    With `same_seed` every text has the seed `seed`. The agent is connected for `settle_s` seconds before the first one.
    """

    preset: str
    settings: Mapping[str, str] = {}
    prompts: Sequence[list[int]]
    tokens: int
    temperature: float = 0.0
    seed: int = 1
    same_seed: bool = False
    settle_s: float = 0.0

    @property
    def config(self) -> Config:
        """The settings of every text.

        Raises:
            ConfigError: an unknown preset or setting, or a bad value.
        """
        return load(preset=self.preset, environ={}, flags={**PATIENT, **self.settings}).config


async def ordered(agent: AgentCore, order: TextOrder, *, context_max: int, eos_ids: frozenset[int]) -> list[TimedText]:
    """Have an agent write the texts of an order, one after the other."""
    generation, texts = order.config.generation, list[TimedText]()
    for number, prompt in enumerate(order.prompts):
        seed = order.seed + (0 if order.same_seed else number)
        sampling = Sampling(seed, order.temperature, 1.0, generation.coupling)
        texts.append(await timed_text(agent, Job(generation, sampling, order.tokens, context_max, eos_ids), prompt))
    return texts
