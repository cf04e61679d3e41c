"""A pair of toy language models whose laws depend on the last few tokens: exact, cheap, and in partial agreement.

They stand where the ONNX pair stands, so that whole fleets run in virtual time; `agreement` sets how much the small
model's logits share with the large one's.
"""

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.batching import Output
from edge_agent.model import Drawn
from fedhlm.messages import Fingerprint, Sampling
from fedhlm.sampling import COUPLINGS, NOISE
from fedhlm.uncertainty import closed_form

VOCAB_SIZE: Final = 48
EOS_ID: Final = 0
CONTEXT: Final = 512
_ORDER: Final = 3  # tokens that the next law depends on
_SPREAD: Final = 2.0  # standard deviation of the logits
FINGERPRINT: Final = Fingerprint("toy", VOCAB_SIZE, NOISE, "toy")


@lru_cache(maxsize=65_536)
def _normal(model: int, suffix: tuple[int, ...]) -> NDArray[np.float64]:
    noise = np.random.default_rng((model, *suffix)).standard_normal(VOCAB_SIZE)
    noise.setflags(write=False)
    return noise


def large_logits(ids: Sequence[int]) -> NDArray[np.float64]:
    """The LLM's logits after `ids`; shape (VOCAB_SIZE,). The end of text is rare."""
    logits = _SPREAD * _normal(1, tuple(ids[-_ORDER:]))
    logits[EOS_ID] = -1.5 * _SPREAD
    return logits


def small_logits(ids: Sequence[int], agreement: float) -> NDArray[np.float64]:
    """The SLM's logits after `ids`; with agreement 1 they are the LLM's."""
    return agreement * large_logits(ids) + (1.0 - agreement) * _SPREAD * _normal(2, tuple(ids[-_ORDER:]))


def large_alone(prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> list[int]:
    """The oracle: what the LLM writes by itself with this seed, up to its end of text."""
    ids = list(prompt)
    settle = COUPLINGS[sampling.coupling].settle
    for _ in range(max_tokens):
        ids.append(settle(large_logits(ids), sampling, len(ids), None, b""))
        if ids[-1] == EOS_ID:
            break
    return ids[len(prompt) :]


class ToyCache(NamedTuple):
    """The ids seen so far are all there is to remember."""

    ids: tuple[int, ...] = ()

    def truncated(self, length: int) -> "ToyCache":
        """The cache of the first `length` tokens."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cache cannot be cut to {length} tokens: it holds {len(self.ids)}")
        return ToyCache(self.ids[:length])


async def large_forward(requests: Sequence[tuple[Any, list[int]]], *, step_s: float = 0.02) -> list[Output]:
    """One batched call of the LLM, `step_s` seconds long."""
    await asyncio.sleep(step_s)
    outputs = []
    for cache, new in requests:
        ids = [*cache.ids, *new]
        rows = [large_logits(ids[: len(cache.ids) + i + 1]) for i in range(len(new))]
        outputs.append(Output(np.stack(rows), ToyCache(tuple(ids))))
    return outputs


class ToyDrafter:
    """The SLM as an agent's Drafter, `step_s` seconds a token."""

    def __init__(self, *, agreement: float, step_s: float = 0.01) -> None:
        self._agreement = agreement
        self._step_s = step_s

    async def draft(self, ids: Sequence[int], sampling: Sampling) -> Drawn:
        """See `edge_agent.model.Drafter`."""
        await asyncio.sleep(self._step_s)
        return self.draft_now(ids, sampling)

    def draft_now(self, ids: Sequence[int], sampling: Sampling) -> Drawn:
        """The same without the time it takes."""
        logits = small_logits(ids, self._agreement)
        token, prob, law = COUPLINGS[sampling.coupling].draft(logits, sampling, len(ids))
        return Drawn(token, prob, closed_form(logits, token), law)
