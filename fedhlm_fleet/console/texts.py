"""The text of each single token, with the models' own tokenizer."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedhlm.decoding.models import tokenizer_at
from fedhlm.decoding.text import TextStream
from fedhlm.errors import ModelError
from fedhlm.settings import Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Pieces:
    """Splits the text of messages into tokens. Without the fleet's tokenizer a message is one piece.

    That the tokenizer is the fleet's is seen from the text: what it makes of the ids must be what the agent wrote.
    """

    def __init__(self, tokenizer: "Tokenizer | None") -> None:
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else TextStream(tokenizer)

    def told(self, ids: tuple[int, ...], text: str) -> list[str] | None:
        """Return the text of each id, in order; None if they cannot be told apart."""
        if self._stream is None:
            return None
        pieces = [self._stream.push([token]) for token in ids]
        if "".join(pieces) != text:
            if ids or text:
                self._stream = None
            return None
        return pieces

    def by_source(self, ids: tuple[int, ...], text: str, sources: Sequence[str]) -> list[tuple[str, str]]:
        """Return the text of each id with its source; if they cannot be told apart, all of it, with `mixed` for several."""
        told = self.told(ids, text)
        if told is not None:
            return list(zip(told, sources, strict=True))
        if not text:
            return []
        return [(text, sources[0] if len(set(sources)) == 1 else "mixed")]

    def alone(self, token: int) -> str | None:
        """The text of one id by itself; None without a tokenizer."""
        return None if self._tokenizer is None else str(self._tokenizer.decode([token], skip_special_tokens=False))


def pieces_maker(settings: Config) -> Callable[[], Pieces]:
    """Return a function that makes a decoder of one text, with the fleet's tokenizer.

    That is `agent.target_tokenizer`, or that of `agent.model` or of the shipped model.

    Raises:
        ModelError: what is configured has no readable tokenizer.
    """
    tokenizer, configured = None, settings.agent.target_tokenizer or settings.agent.model
    try:
        with contextlib.suppress(ModuleNotFoundError):  # texts are then shown message by message
            from fedhlm_zoo.shipped import model_folder  # some images have no models, and not this package

            tokenizer, _ = tokenizer_at(model_folder(configured, "slm"))
    except ModelError as exc:
        if configured:
            raise
        print(f"fedhlm: texts are shown message by message: {exc}", file=sys.stderr)
    return lambda: Pieces(tokenizer)
