"""Text that grows: characters stay whole, and where a stop string ends it does not depend on how the ids came in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.decoding.decoder import Decoder
from fedhlm.decoding.text import StoppedText, TextStream, encode_prompt
from fedhlm_zoo.shipped import model_folder


class Letters:
    """A tokenizer of single bytes."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """A tokenizer of the words that it is given: an id is a place in their list."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(self.words[i] for i in ids)


def test_a_control_tokens_name_in_a_prompt_is_text() -> None:
    """Whoever writes the text of a prompt cannot end it in the model's eyes."""
    decoder = Decoder.load(model_folder("", "slm"), threads=1)
    begin = decoder.info.bos_id
    assert begin is not None
    name = decoder.tokenizer.id_to_token(begin)
    ids = encode_prompt(decoder.tokenizer, f"a{name}b", begin)
    assert ids.index(begin) == 0
    assert begin not in ids[1:]
    assert decoder.tokenizer.decode(ids[1:]) == f"a{name}b"


def text_of(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = StoppedText(TextStream(Letters()), stop)
    shown = [text.push(list(piece))[1] for piece in pieces]
    return [*shown, text.rest()], text.stopped


def test_characters_are_never_split() -> None:
    snow = "☃".encode()
    assert text_of([b"a", snow[:1], snow[1:2], snow[2:], b"b"])[0] == ["a", "", "", "☃", "b", ""]


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end() -> None:
    shown, stopped = text_of([b"a ST", b"OO", b" ST"], ("STOP",))
    assert ("".join(shown), stopped) == ("a STOO ST", False)


def first_stop(text: str, stop: list[str]) -> tuple[int, int] | None:
    """(end, start) of the stop string that is complete first, by trying every length of the text."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if s and text[:end].endswith(s)]
        if starts:
            return end, min(starts)
    return None


@given(
    words=st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    stop=st.lists(st.text(alphabet="ab", max_size=5), max_size=4),
    data=st.data(),
)
def test_the_stop_that_is_complete_first_ends_text_and_ids_however_they_came(
    words: list[str], stop: list[str], data: st.DataObject
) -> None:
    text = StoppedText(TextStream(Words(words)), tuple(stop))
    ids = list(range(len(words)))
    shown, count, whole = "", 0, "".join(words)
    while ids:
        size = data.draw(st.integers(1, len(ids)))
        piece, ids = ids[:size], ids[size:]
        kept, new = text.push(piece)
        count, shown = count + kept, shown + new
    shown += text.rest()
    found = first_stop(whole, stop)
    assert text.stopped == (found is not None)
    if found is None:
        assert (shown, count) == (whole, len(words))
        return
    end, start = found
    assert shown == whole[:start]
    lengths = [len("".join(words[:n])) for n in range(len(words) + 1)]
    assert count == next(n for n, length in enumerate(lengths) if length >= end), (
        "ids end with the one that completes it"
    )


@pytest.mark.parametrize(
    "cuts", [[b"say STOP now"], [b"say S", b"TO", b"P now"], [bytes([c]) for c in b"say STOP now"]]
)
def test_no_part_of_a_stop_string_is_shown(cuts: list[bytes]) -> None:
    shown, stopped = text_of(cuts, ("STOP",))
    assert ("".join(shown), stopped) == ("say ", True)
