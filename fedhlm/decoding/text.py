"""Text at the program's edge: prompts to ids, committed ids to text that never splits a character."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BROKEN: Final = "\N{REPLACEMENT CHARACTER}"


def encode_prompt(tokenizer: "Tokenizer", text: str, bos_id: int | None) -> list[int]:
    """Ids of a prompt, after the model's begin-of-text id if it has one."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids if bos_id is None else [bos_id, *ids]


class TextStream:
    """Decodes a growing list of ids; bytes of an unfinished character wait for the next push."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0

    @property
    def text(self) -> str:
        """All of the text so far, unfinished characters included."""
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """The text that `ids` add; with `last` nothing is held back."""
        self._ids += ids
        text = self.text
        if not last:
            text = text.rstrip(_BROKEN)
        new = text[self._done :]
        self._done = max(self._done, len(text))
        return new
