"""Prompts from the bus to outputs on the bus: one request at a time, each answered with committed tokens as they come."""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from edge_agent.agent import Agent, Result, plan_of
from edge_agent.generation import Committed
from fedhlm import topics
from fedhlm.config import Generation as GenerationConfig
from fedhlm.config import Loaded
from fedhlm.errors import FedhlmError
from fedhlm.messages import FinishReason, Output, Presence, Prompt, Sampling, Verdict
from fedhlm.telemetry import Counters
from fedhlm.text import TextStream, encode_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

PROMPTS_MAX: Final = 256
REQUESTS_REMEMBERED: Final = 1_024


class ModelFacts(NamedTuple):
    """What the service must know of the SLM besides how to draft."""

    tokenizer: "Tokenizer"
    bos_id: int | None
    eos_ids: frozenset[int]
    context: int


class AgentService:
    """Serves prompts until cancelled."""

    def __init__(self, *, agent: Agent, loaded: Loaded, model: ModelFacts, counters: Counters) -> None:
        self.agent = agent
        self._loaded = loaded
        self._model = model
        self._counters = counters
        self._prompts: asyncio.Queue[Prompt] = asyncio.Queue(PROMPTS_MAX)
        self._seen: OrderedDict[str, None] = OrderedDict()

    async def subscribe(self) -> None:
        """To be called before the bus connects, so that the agent is not online before it hears prompts."""
        agent = self.agent
        await agent.subscribe()
        await agent.party.bus.subscribe(topics.PROMPT.name(agent.party.root, cluster=agent.cluster, agent=agent.name))

    async def run(self) -> None:
        """Serve until cancelled, or until the bus is refused for good (BusError)."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._receive(), name="agent-receive")
            group.create_task(self._serve(), name="agent-serve")

    async def _receive(self) -> None:
        async for received in self.agent.party.received():
            match received.message:
                case Verdict() as verdict:
                    self.agent.on_verdict(verdict)
                case Presence(role="edge") as state:
                    self.agent.on_edge(state)
                case Prompt() as prompt:
                    await self._accept(prompt)
                case _:
                    self._counters.add("refused_messages")

    async def _accept(self, prompt: Prompt) -> None:
        if prompt.request in self._seen:
            self._counters.add("duplicate_messages")
            return
        if self._prompts.full():
            self._counters.add("dropped_messages")
            await self._refuse(prompt, f"agent {self.agent.name} has {PROMPTS_MAX} prompts waiting: ask later")
            return
        self._seen[prompt.request] = None
        while len(self._seen) > REQUESTS_REMEMBERED:
            self._seen.popitem(last=False)
        self._prompts.put_nowait(prompt)

    async def _serve(self) -> None:
        while True:
            prompt = await self._prompts.get()
            try:
                await self.complete(prompt)
            except (FedhlmError, ValueError) as exc:
                await self._refuse(prompt, str(exc))
            except Exception as exc:  # one request's failure must not end the service
                log.exception("request %s failed", prompt.request)
                await self._refuse(prompt, f"{type(exc).__name__}: {exc}")

    async def _refuse(self, prompt: Prompt, error: str) -> None:
        await self._publish(prompt.request, 0, [], "", "error", error[:1_024], {})

    async def complete(self, prompt: Prompt, show: Callable[[str], object] | None = None) -> Result:
        """Serve one prompt; `show` gets the text as well, as it is committed.

        Raises:
            ConfigError: an unknown preset.
            ValueError: a prompt without tokens, or longer than the model's context.
        """
        config = self._config(prompt)
        sampling = self._sampling(prompt, config)
        plan = plan_of(
            config,
            sampling,
            max_tokens=prompt.max_tokens,
            context_max=self._model.context,
            eos_ids=self._model.eos_ids,
        )
        text = StoppedText(TextStream(self._model.tokenizer), prompt.stop)
        count = 0

        async def publish(tokens: list[Committed]) -> FinishReason | None:
            nonlocal count
            new = text.push([t.token for t in tokens])
            if show is not None:
                show(new)
            await self._publish(prompt.request, count, tokens, new, None, "", {})
            count += len(tokens)
            return "stop" if text.stopped else None

        ids = encode_prompt(self._model.tokenizer, prompt.text, self._model.bos_id)
        result = await self.agent.generate(plan, ids, publish)
        finish = "stop" if text.stopped else result.finish
        rest = text.rest()
        if show is not None:
            show(rest)
        await self._publish(prompt.request, count, [], rest, finish, result.error, result.statistics())
        return result

    def _config(self, prompt: Prompt) -> GenerationConfig:
        loaded = self._loaded if prompt.preset is None else self._loaded.with_preset(prompt.preset)
        return loaded.config.generation

    def _sampling(self, prompt: Prompt, config: GenerationConfig) -> Sampling:
        seed = prompt.seed
        if seed is None:  # two outputs never share their noise
            digest = hashlib.sha256(f"{config.seed}/{self.agent.name}/{prompt.request}".encode()).digest()
            seed = int.from_bytes(digest[:8]) >> 1
        return Sampling(
            seed=seed,
            temperature=config.temperature if prompt.temperature is None else prompt.temperature,
            top_p=config.top_p if prompt.top_p is None else prompt.top_p,
            coupling=config.coupling,
        )

    async def _publish(
        self,
        request: str,
        position: int,
        tokens: list[Committed],
        text: str,
        finish: FinishReason | None,
        error: str,
        statistics: dict[str, float],
    ) -> None:
        party = self.agent.party
        message = Output(
            **party.stamp(),
            request=request,
            position=position,
            ids=tuple(t.token for t in tokens),
            sources=tuple(t.source for t in tokens),
            text=text,
            finish=finish,
            error=error,
            statistics=statistics,
        )
        await party.send(topics.OUTPUT, message, cluster=self.agent.cluster, agent=self.agent.name)


class StoppedText:
    """A text stream that ends before the first stop string, and never lets a part of one out."""

    def __init__(self, stream: TextStream, stop: tuple[str, ...]) -> None:
        self._stream = stream
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False

    def push(self, ids: list[int]) -> str:
        """Text that may be shown now."""
        if self.stopped:
            return ""
        self._held += self._stream.push(ids)
        places = [p for s in self._stop if (p := self._held.find(s)) >= 0]
        if places:
            self.stopped = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((self._overlap(s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def rest(self) -> str:
        """What was held back, once the generation is over."""
        return "" if self.stopped else self._held + self._stream.push([], last=True)

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
