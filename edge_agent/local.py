"""Answers clients on the agent's own machine, through the same queue as prompts from the bus."""

import asyncio
import random
from collections.abc import AsyncGenerator

from edge_agent.requests import RoutedPrompt
from edge_agent.service import AgentService
from fedhlm.answering import Offer, Question, Slice
from fedhlm.bus.party import Stamp
from fedhlm.protocol.messages import Cancel, Prompt


class LocalQuestions:
    """The `Answerer` of an agent. Its answers never travel over the bus.

    Names of senders and requests contain a '/', so that no client of the bus can have the same.
    """

    def __init__(self, service: AgentService, offer: Offer) -> None:
        self._service = service
        self._offer = offer
        self._life = f"{random.SystemRandom().getrandbits(40):010x}"
        self._asked = 0

    @property
    def offer(self) -> Offer:
        """See `Answerer.offer`."""
        return self._offer

    async def answer(self, question: Question) -> AsyncGenerator[Slice, None]:
        """See `Answerer.answer`."""
        self._asked += 1
        name, stamp = f"local/{self._life}-{self._asked}", Stamp(f"local/{question.asker}")
        prompt = Prompt(
            **stamp(),
            request=name,
            text="",
            max_tokens=question.max_tokens,
            seed=question.seed,
            temperature=question.temperature,
            top_p=question.top_p,
            top_k=question.top_k,
            min_p=question.min_p,
            stop=question.stop,
            preset=question.preset,
            grammar=question.grammar,
        )
        slices: asyncio.Queue[Slice] = asyncio.Queue()
        service = self._service
        request = RoutedPrompt(
            service.agent.cluster,
            prompt,
            asyncio.get_running_loop().time(),
            ids=question.ids,
            tell=slices.put_nowait,
            context=question.context,
        )
        await service.admit(request)
        try:
            if not request.answered:
                yield Slice()
            while not (request.answered and slices.empty()):
                yield await slices.get()
        finally:
            if not request.answered:
                await service.cancel(Cancel(**stamp(), request=name))
