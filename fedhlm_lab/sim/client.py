"""A patient client on the bus: asks an agent, puts the pieces of the answer in order, asks again where no news comes."""

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from fedhlm.bus.party import Party
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output, Prompt
from fedhlm_lab.sim.toy import ToyTokenizer

PATIENCE_GROWS: Final = 2.0


class Request(NamedTuple):
    """What is asked of whom; `name` is unique in a run, and so is `seed`."""

    cluster: str
    agent: str
    name: str
    prompt: list[int]
    seed: int


class Answer(NamedTuple):
    """A whole answer, and how often it was asked for."""

    ids: list[int]
    text: str
    attempts: int


@dataclass
class _Open:
    """A request's pieces by position; MQTT may bring them twice, in any order, or not."""

    pieces: dict[tuple[int, bool], Output] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, output: Output) -> None:
        self.pieces.setdefault((output.position, output.finish is not None), output)
        self.news.set()

    def whole(self) -> tuple[list[int], str] | None:
        """Ids and text, once nothing is missing up to the end."""
        ids: list[int] = []
        text = ""
        while (piece := self.pieces.get((len(ids), False))) is not None and piece.ids:
            ids += piece.ids
            text += piece.text
        last = self.pieces.get((len(ids), True))
        return None if last is None else (ids, text + last.text)


class Client:
    """Asks over one bus. A request that brings no news for `patience_s` is asked for again under another name, each time
    more patiently. `seeds` gets the seed of every name that was used."""

    def __init__(self, party: Party, *, patience_s: float, seeds: dict[str, int]) -> None:
        self._party = party
        self._patience_s = patience_s
        self._seeds = seeds
        self._open: dict[str, _Open] = {}
        self.asked_again = 0

    async def subscribe(self) -> None:
        """Ask for every agent's outputs."""
        await self._party.bus.subscribe(topics.OUTPUT.name(cluster="+", agent="+"))

    async def listen(self) -> None:
        """Read the bus until it closes."""
        async for received in self._party.received():
            message = received.message
            if isinstance(message, Output) and message.request in self._open:
                self._open[message.request].take(message)

    async def ask(
        self, request: Request, *, max_tokens: int, temperature: float, patience_s: float | None = None
    ) -> Answer:
        """Ask until the answer is whole."""
        patience_s = self._patience_s if patience_s is None else patience_s
        for attempt in itertools.count(1):
            name = f"{request.name}.{attempt}"
            self._seeds[name] = request.seed
            answer = self._open[name] = _Open()
            try:
                prompt = Prompt(
                    **self._party.stamp(),
                    request=name,
                    text=ToyTokenizer().decode(request.prompt),
                    max_tokens=max_tokens,
                    seed=request.seed,
                    temperature=temperature,
                )
                await self._party.send(topics.PROMPT, prompt, cluster=request.cluster, agent=request.agent)
                whole = await self._whole(answer, patience_s)
            finally:
                del self._open[name]
            if whole is not None:
                return Answer(*whole, attempt)
            patience_s *= PATIENCE_GROWS
            self.asked_again += 1
        raise AssertionError("unreachable")

    async def _whole(self, answer: _Open, patience_s: float) -> tuple[list[int], str] | None:
        while (whole := answer.whole()) is None:
            answer.news.clear()
            try:
                async with asyncio.timeout(patience_s):
                    await answer.news.wait()
            except TimeoutError:
                return None
        return whole
