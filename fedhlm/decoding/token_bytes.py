"""The bytes of each id of a tokenizer, by which two tokenizers can be compared."""

import json
import re
from typing import TYPE_CHECKING, Any, Final

from fedhlm.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


class TokenBytes:
    """What the ids of a tokenizer are in bytes, and how bytes are cut into ids.

    `spelt[id]` is the id's bytes; empty for control tokens, which stand for no text. `controls` has their names.
    """

    def __init__(self, tokenizer: "Tokenizer", size: int) -> None:
        """Read the ids below `size`.

        Raises:
            ModelError: its tokens are neither bytes (byte-level BPE) nor words of SentencePiece.
        """
        document = json.loads(tokenizer.to_str())
        read = _reader(document)
        added = tokenizer.get_added_tokens_decoder()
        self.controls = {number: token.content for number, token in added.items() if token.special and number < size}
        plain = {number: token.content for number, token in added.items() if not token.special}
        texts = [tokenizer.id_to_token(number) for number in range(size)]
        self.spelt: list[bytes] = [
            b""
            if text is None or number in self.controls
            else plain[number].encode()
            if number in plain
            else read(text)
            for number, text in enumerate(texts)
        ]
        self._tokenizer = tokenizer
        self._ids: dict[bytes, int] = {}
        for number, spelt in enumerate(self.spelt):
            if spelt:
                self._ids.setdefault(spelt, number)
        self.longest = max(map(len, self._ids), default=0)
        first = tokenizer.encode("a", add_special_tokens=False).ids[:1]
        self._prefixed = bool(first) and self.spelt[first[0]][:1] == b" "

    def cut(self, text: bytes) -> list[int]:
        """Cut bytes into ids as the tokenizer cuts a text, and what is no text into the longest tokens.

        Bytes that no token has are left out.
        """
        if text in self._ids:
            return [self._ids[text]]
        whole = _characters(text)
        # A tokenizer that puts a space before every text would put a second one before a word that has its own.
        begin = int(self._prefixed and whole[:1] == b" ")
        ids: list[int] = self._tokenizer.encode(whole[begin:].decode(), add_special_tokens=False).ids
        if b"".join(self.spelt[token] for token in ids) != whole:
            return self._longest_first(text)
        return [*ids, *self._longest_first(text[len(whole) :])]

    def _longest_first(self, text: bytes) -> list[int]:
        ids, begin = [], 0
        while begin < len(text):
            for end in range(min(len(text), begin + self.longest), begin, -1):
                token = self._ids.get(text[begin:end])
                if token is not None:
                    ids.append(token)
                    begin = end
                    break
            else:
                begin += 1
        return ids


def _characters(text: bytes) -> bytes:
    """The longest beginning that consists of whole characters."""
    try:
        text.decode()
    except UnicodeDecodeError as exc:
        return text[: exc.start]
    return text


def _reader(document: Any) -> Any:
    """A function from the text of a token in a vocabulary to its bytes."""
    decoder = json.dumps(document.get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        alphabet = _byte_alphabet()
        return lambda text: bytes(byte for c in text for byte in ([alphabet[c]] if c in alphabet else c.encode()))
    if _SPACE in decoder or '"Metaspace"' in decoder:

        def read(text: str) -> bytes:
            found = _BYTE.fullmatch(text)
            return bytes.fromhex(found[1]) if found else text.replace(_SPACE, " ").encode()

        return read
    raise ModelError(f"decoder of a tokenizer must be ByteLevel or that of SentencePiece (got {decoder[:100]})")
