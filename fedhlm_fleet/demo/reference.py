"""The oracle of a run: each model alone, one token at a time, with the seeds of the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import Decoder, Request
from fedhlm.decoding.text import encode_prompt
from fedhlm.protocol.messages import Sampling


class Alone:
    """A model that writes by itself: what `exact` must equal when the model is the cloud's."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    @classmethod
    def load(cls, folder: Path, *, threads: int) -> Self:
        """Open a model folder.

        Raises:
            ModelError: the folder cannot be used.
        """
        return cls(Decoder.load(folder, threads=threads))

    def encode(self, text: str) -> list[int]:
        """Prompt ids, with the begin-of-text id."""
        return encode_prompt(self._decoder.tokenizer, text, self._decoder.info.bos_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids."""
        return str(self._decoder.tokenizer.decode(list(ids), skip_special_tokens=True))

    def write(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> list[int]:
        """Up to `max_tokens` ids after the prompt, by the target side of the sampling's coupling."""
        info = self._decoder.info
        settle = COUPLINGS[sampling.coupling].settle
        ids = list(prompt)
        cache, new = self._decoder.empty_cache(), ids
        while len(ids) < min(len(prompt) + max_tokens, info.context):
            result = self._decoder.forward([Request(cache, new)])[0]
            cache = result.cache
            ids.append(settle(result.logits[-1], sampling, len(ids), None, b""))
            new = ids[-1:]
            if ids[-1] in info.eos_ids:
                break
        return ids[len(prompt) :]
