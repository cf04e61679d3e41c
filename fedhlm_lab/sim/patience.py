"""A patient user: asks again, under another name and with more patience, when an answer is not complete."""

import itertools
from typing import Final, NamedTuple

from fedhlm.answers import Result
from fedhlm.client import Client
from fedhlm.errors import AgentOffline, DeadlinePassed, PiecesLost
from fedhlm_lab.sim.toy import ToyTokenizer

PATIENCE_GROWS: Final = 2.0


class ScriptedRequest(NamedTuple):
    """A request to one agent; `name` and `seed` are unique in a run."""

    cluster: str
    agent: str
    name: str
    prompt: list[int]
    seed: int


class Patient:
    """Asks through one client, and gives up a request without news for `patience_s`.

    `seeds` records the seed of every name used.
    """

    def __init__(self, client: Client, *, patience_s: float, seeds: dict[str, int]) -> None:
        self._client = client
        self._patience_s = patience_s
        self._seeds = seeds
        self.asked_again = 0

    async def ask(
        self, request: ScriptedRequest, *, max_tokens: int, temperature: float, patience_s: float | None = None
    ) -> tuple[Result, int]:
        """Ask until the answer is complete; return it and the number of attempts."""
        patience_s = self._patience_s if patience_s is None else patience_s
        text = ToyTokenizer().decode(request.prompt)
        for attempt in itertools.count(1):
            name = f"{request.name}.{attempt}"
            self._seeds[name] = request.seed
            try:
                result = await self._client.write(
                    request.agent,
                    text,
                    cluster=request.cluster,
                    max_tokens=max_tokens,
                    seed=request.seed,
                    temperature=temperature,
                    patience_s=patience_s,
                    request=name,
                )
            except (AgentOffline, DeadlinePassed, PiecesLost):
                patience_s *= PATIENCE_GROWS
                self.asked_again += 1
            else:
                return result, attempt
        raise AssertionError("unreachable")
