"""Conversion between text and ids. Generated text never splits a character and ends at a stop string."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKEN_BYTES_MAX: Final = 256  # no vocabulary has longer tokens
_BROKEN: Final = "\N{REPLACEMENT CHARACTER}"


def encode_prompt(tokenizer: "Tokenizer", text: str, bos_id: int | None) -> list[int]:
    """Return the ids of a prompt, after the begin-of-text id if the model has one."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if bos_id is None else [bos_id, *ids]


class TextStream:
    """Decodes a growing list of ids. The bytes of an incomplete character wait for the next push."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0

    @property
    def text(self) -> str:
        """The whole text so far, incomplete characters included."""
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """Add ids and return the text that they add. With `last` nothing is held back."""
        self._ids += ids
        text = self.text
        if not last:
            text = text.rstrip(_BROKEN)
        new = text[self._done :]
        self._done = max(self._done, len(text))
        return new


class StoppedText:
    """A text that ends before its first stop string, and never shows a part of a stop string.

    The first stop string is the one that is complete first. Of several that are complete at the same character, it is
    the longest. The result therefore does not depend on how the ids were grouped.
    """

    def __init__(self, stream: TextStream, stop: tuple[str, ...]) -> None:
        self._stream = stream
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False

    def push(self, ids: list[int]) -> tuple[int, str]:
        """Add ids. Return how many of them belong to the text, and the text that may be shown now.

        The id that completes a stop string is the last one that belongs to the text.
        """
        if self.stopped:
            return 0, ""
        if not self._stop:
            return len(ids), self._stream.push(ids)
        for count, token in enumerate(ids, start=1):
            self._held += self._stream.push([token])
            ends = [(p + len(s), p) for s in self._stop if (p := self._held.find(s)) >= 0]
            if ends:
                self.stopped = True
                shown, self._held = self._held[: min(ends)[1]], ""
                return count, shown
        keep = max(self._overlap(s) for s in self._stop)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return len(ids), shown

    def rest(self) -> str:
        """Return the text that was held back. Call it when the generation is over."""
        return "" if self.stopped else self._held + self._stream.push([], last=True)

    def _overlap(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
