"""Two toy language models whose laws depend on the last few tokens: exact, cheap, and in partial agreement.

They replace the ONNX pair, so that whole fleets run in virtual time. `agreement` is how much of the large model's
logits the small one shares.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.engine import DraftModel, Engine, EngineInput, EngineOutput
from edge_agent.growth import TreeRequest, Trees, grow
from edge_agent.model import Drawn, TreeDraft
from fedhlm.decoding.alone import write
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.sampling import NOISE
from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.peers.context_keys import DIMS
from fedhlm.protocol.messages import Fingerprint, Sampling
from fedhlm_lab.sim.world import Pair

VOCAB_SIZE: Final = 48
EOS_ID: Final = 0
CONTEXT: Final = 512
TOKEN_BYTES: Final = 256 * 2**10  # of a cache, as large as a large model's: few contexts fit
DRAWN_MAX: Final = 4_096
_ORDER: Final = 3  # tokens that the next law depends on
_CONTEXTS: Final = VOCAB_SIZE**_ORDER + 8_192  # above the number of different laws, each of which is made once
_FIRST: Final = ord("@")
_SPREAD: Final = 2.0  # standard deviation of the logits
FINGERPRINT: Final = Fingerprint("toy", VOCAB_SIZE, NOISE, "toy")


def _normal(model: int, suffix: tuple[int, ...]) -> NDArray[np.float64]:
    return np.random.default_rng((model, *suffix)).standard_normal(VOCAB_SIZE)


@lru_cache(maxsize=_CONTEXTS)
def known_large(suffix: tuple[int, ...]) -> NDArray[np.float64]:
    """The LLM's logits after the last tokens that count."""
    logits = _SPREAD * _normal(1, suffix)
    logits[EOS_ID] = -1.5 * _SPREAD
    logits.setflags(write=False)
    return logits


@lru_cache(maxsize=_CONTEXTS)
def known_small(suffix: tuple[int, ...], agreement: float) -> NDArray[np.float64]:
    """The SLM's logits after the last tokens that count."""
    logits = agreement * known_large(suffix) + (1.0 - agreement) * _SPREAD * _normal(2, suffix)
    logits.setflags(write=False)
    return logits


def large_logits(ids: Sequence[int]) -> NDArray[np.float64]:
    """The LLM's logits after `ids`, shape (VOCAB_SIZE,), read-only. The end of text is rare."""
    return known_large(tuple(ids[-_ORDER:]))


def small_logits(ids: Sequence[int], agreement: float) -> NDArray[np.float64]:
    """The SLM's logits after `ids`, shape (VOCAB_SIZE,), read-only; with agreement 1 they are the LLM's."""
    return known_small(tuple(ids[-_ORDER:]), agreement)


def large_alone(prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> list[int]:
    """The oracle: what the LLM alone writes with this seed."""
    return write(large_logits, prompt, sampling, max_tokens, eos_ids={EOS_ID}, context_max=CONTEXT)


class ToyCache(NamedTuple):
    """A cache: the ids seen so far."""

    ids: tuple[int, ...] = ()

    def truncated(self, length: int) -> "ToyCache":
        """The cache of the first `length` tokens."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cache cannot be cut to {length} tokens: it holds {len(self.ids)}")
        return ToyCache(self.ids[:length])


Logits = Callable[[Sequence[int]], NDArray[np.float64]]
"""Maps the ids so far to the logits of the next token, shape (VOCAB_SIZE,)."""


def outputs_of(logits: Logits, requests: Sequence[EngineInput]) -> list[EngineOutput]:
    """One batched call of a model."""
    outputs = []
    for cache, new, wanted in requests:
        ids = [*cache.ids, *new]
        rows = [logits(ids[:end]) for end in range(len(ids) - wanted + 1, len(ids) + 1)]
        outputs.append(EngineOutput(np.reshape(rows, (wanted, VOCAB_SIZE)), ToyCache(tuple(ids))))
    return outputs


async def large_forward(requests: Sequence[EngineInput], *, step_s: float = 0.02) -> list[EngineOutput]:
    """One batched call of the LLM that takes `step_s` seconds."""
    await asyncio.sleep(step_s)
    return large_outputs(requests)


def large_outputs(requests: Sequence[EngineInput]) -> list[EngineOutput]:
    """One batched call of the LLM."""
    return outputs_of(large_logits, requests)


def beside(agreement: float, *, step_s: float = 0.002) -> DraftModel:
    """The SLM as the cloud's own draft model; a call takes `step_s` seconds."""

    async def forward(requests: Sequence[EngineInput]) -> list[EngineOutput]:
        await asyncio.sleep(step_s)
        return outputs_of(partial(small_logits, agreement=agreement), requests)

    return DraftModel(Engine(ToyCache(), forward, TOKEN_BYTES // 8), CONTEXT)


def engine(*, step_s: float = 0.02) -> Engine:
    """The LLM as the cloud's engine; a call takes `step_s` seconds."""
    return Engine(ToyCache(), partial(large_forward, step_s=step_s), TOKEN_BYTES)


@lru_cache(maxsize=_CONTEXTS)
def known_key(suffix: tuple[int, ...]) -> bytes:
    """The key of the last tokens that count."""
    vector = np.random.default_rng((3, *suffix)).standard_normal(DIMS)  # (DIMS,)
    return np.rint(vector / np.linalg.norm(vector) * 127.0).astype(np.int8).tobytes()


def key_of(ids: Sequence[int]) -> bytes:
    """The key of a context: equal where the toy models' laws are equal, almost orthogonal elsewhere."""
    return known_key(tuple(ids[-_ORDER:]))


class Encoding(NamedTuple):
    """An encoded text."""

    ids: list[int]


class ToyTokenizer:
    """One character per token, none for the end of text; replaces a `tokenizers.Tokenizer`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """The ids of a text made by `decode`."""
        return Encoding([ord(character) - _FIRST for character in text])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return "".join(chr(_FIRST + i) for i in ids if i != EOS_ID or not skip_special_tokens)


def pair(agreement: float) -> Pair:
    """The toy models as a fleet's pair."""
    return Pair(
        fingerprint=FINGERPRINT,
        eos_ids=frozenset({EOS_ID}),
        context=CONTEXT,
        engine=engine,
        drafter=lambda: ToyDrafter(agreement=agreement),
        space="",
        beside=lambda: beside(agreement),
    )


class ToyDrafter:
    """The SLM as an agent's Drafter; a model call takes `step_s` seconds."""

    def __init__(self, *, agreement: float, step_s: float = 0.01) -> None:
        self._agreement = agreement
        self._step_s = step_s
        self._trees = Trees(frozenset({EOS_ID}))
        self._drawn: dict[tuple[tuple[int, ...], Sampling, str], Drawn] = {}

    async def draft(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        """See `edge_agent.model.Drafter`."""
        await asyncio.sleep(self._step_s)
        return self.draft_now(ids, sampling, uncertainty)

    def draft_now(self, ids: Sequence[int], sampling: Sampling, uncertainty: str = "closed-form") -> Drawn:
        """Draft without taking time.

        Recent drafts are remembered, because a rollback repeats much of the drafting.
        """
        name = (tuple(ids), sampling, uncertainty)
        drawn = self._drawn.get(name)
        if drawn is None:
            logits = small_logits(ids, self._agreement)
            token, prob, law = COUPLINGS[sampling.coupling].draft(logits, sampling, len(ids))
            doubt = UNCERTAINTIES[uncertainty](logits, token, sampling, len(ids))
            if len(self._drawn) >= DRAWN_MAX:
                self._drawn.clear()
            drawn = self._drawn[name] = Drawn(token, prob, doubt, law, key_of(ids))
        return drawn

    async def grow(self, request: TreeRequest) -> TreeDraft:
        """See `edge_agent.model.Drafter`."""
        grown, calls = self.grow_now(request)
        await asyncio.sleep(calls * self._step_s)
        return grown

    def grow_now(self, request: TreeRequest) -> tuple[TreeDraft, int]:
        """Grow a tree without taking time; also return the number of model calls."""
        wanted, sampling = list(request.ids), request.sampling
        growth = self._trees.begin(request)
        calls = 0

        def evaluate(nodes: list[int]) -> list[NDArray[np.float64]]:
            nonlocal calls
            calls += 1
            return [small_logits([*wanted, *growth.paths[node]], self._agreement) for node in nodes]

        grow(
            growth,
            evaluate,
            sampling=sampling,
            position=len(wanted),
            node_s=self._step_s,
            clock_s=lambda: calls * self._step_s,
        )
        chain, branches = growth.tree()
        drawn = [
            self.draft_now([*wanted, *growth.paths[growth.parents[node]]], sampling, request.uncertainty)
            for node in chain
        ]
        return TreeDraft(drawn, tuple(branches), growth.expected), calls
