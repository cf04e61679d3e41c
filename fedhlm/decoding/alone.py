"""Decoding with one model alone: the oracle of every comparison with "the LLM alone"."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import LoadedModel, load_model
from fedhlm.decoding.text import encode_prompt
from fedhlm.protocol.messages import Sampling

LogitsAfter = Callable[[list[int]], NDArray[Any]]
"""Returns the logits of the token after the given ids, shape (V,)."""


def write(
    logits_after: LogitsAfter,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    *,
    eos_ids: Collection[int],
    context_max: int,
) -> list[int]:
    """Generate at most `max_tokens` ids after the prompt, with the target side of the coupling in `sampling`.

    The text ends with the first id of `eos_ids`, or when prompt and text fill the context of `context_max` tokens.
    """
    settle = COUPLINGS[sampling.coupling].settle
    ids = list(prompt)
    end = min(len(prompt) + max_tokens, context_max)
    while len(ids) < end:
        ids.append(settle(logits_after(ids), sampling, len(ids), None, b""))
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt) :]


class Alone:
    """Generates text with one model. With the cloud's model it gives what the preset `exact` must equal."""

    def __init__(self, decoder: LoadedModel) -> None:
        self.decoder = decoder

    @classmethod
    def load(cls, model: str | Path, *, threads: int) -> Self:
        """Load the model at a path or URL.

        Raises:
            ModelError: it cannot be used.
        """
        return cls(load_model(model, threads=threads))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, after the begin-of-text id if the model has one."""
        return encode_prompt(self.decoder.tokenizer, text, self.decoder.info.bos_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids."""
        return str(self.decoder.tokenizer.decode(list(ids), skip_special_tokens=True))

    def write(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> list[int]:
        """Generate ids as the function `write` does, with the end-of-text ids and the context of the model.

        Raises:
            GrammarError: the grammar of `sampling` cannot be used.
        """
        info, cache = self.decoder.info, self.decoder.empty_cache()
        held = None if sampling.grammar is None else self.decoder.constrain(sampling.grammar)

        def logits_after(ids: list[int]) -> NDArray[Any]:
            nonlocal cache
            result = self.decoder.forward([DecoderInput(cache, ids[cache.length :], 1)])[0]
            cache = result.cache
            row: NDArray[Any] = result.logits[-1]
            return row if held is None else held.masked(row, ids)

        return write(logits_after, prompt, sampling, max_tokens, eos_ids=info.eos_ids, context_max=info.context)
