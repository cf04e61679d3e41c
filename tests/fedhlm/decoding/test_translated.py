"""A small model in another vocabulary: it conforms, and its law over the large ids is the small model's over texts."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fedhlm.decoding.decoder import Decoder, DecoderInput
from fedhlm.decoding.gguf import Gguf
from fedhlm.decoding.gguf_tokenizer import tokenizer_of
from fedhlm.decoding.models import LoadedModel
from fedhlm.decoding.spoken import Spoken, configured_target, spoken_at
from fedhlm.decoding.text import encode_prompt
from fedhlm.decoding.token_bytes import TokenBytes
from fedhlm.decoding.translated import Translated, in_ids_of
from fedhlm.decoding.vocabulary import vocabulary_in
from fedhlm.errors import ConfigError, ModelError
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder
from fedhlm_zoo.tiny import byte_tokenizer
from fedhlm_zoo.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer
from tests.fedhlm.decoding.conformance import TEXTS, Conformance

END = 0
SIZE = 1_200
LLM = model_folder("", "llm")


@cache
def large() -> Decoder:
    """The shipped LLM, whose logits do not depend on blocks, as the small model of these tests."""
    return Decoder.load(LLM)


def spoken_by(tokenizer: Tokenizer) -> Spoken:
    return Spoken(tokenizer, vocabulary_in(tokenizer.to_str(), LLM), END, (END,))


@cache
def retrained() -> Spoken:
    """Another byte-level BPE, of other and fewer words."""
    tokenizer = train_tokenizer([f"{item.title}\n{item.text}" for item in load_items()], SIZE)
    tokenizer.encode_special_tokens = True
    return spoken_by(tokenizer)


@cache
def in_words() -> Translated:
    return Translated(large(), retrained())


@cache
def in_bytes() -> Translated:
    return Translated(large(), spoken_by(byte_tokenizer()))


def law_after(model: LoadedModel, ids: list[int]) -> NDArray[np.float64]:
    logits = model.forward([DecoderInput(model.empty_cache(), ids, 1)])[0].logits[-1].astype(np.float64)
    return np.asarray(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())


def ids_of(model: LoadedModel, text: str) -> list[int]:
    return encode_prompt(model.tokenizer, text, model.info.bos_id)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return in_words()


class TestTranslated(Conformance):
    sessions = 20


@pytest.mark.parametrize("text", TEXTS)
def test_every_prefix_of_a_text_has_a_law_that_sums_to_one(text: str) -> None:
    """Prefixes of bytes end inside characters, and those of words inside the small model's tokens."""
    for model in (in_bytes(), in_words()):
        ids = ids_of(model, text)
        rows = model.forward([DecoderInput(model.empty_cache(), ids)])[0].logits
        assert rows.shape == (len(ids), model.vocabulary.size)
        np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)


def test_the_law_of_the_first_byte_is_the_mass_of_the_tokens_that_begin_with_it() -> None:
    model, q = in_bytes(), law_after(large(), [END])
    law, spelling = law_after(model, [END]), TokenBytes(large().tokenizer, large().vocabulary.size)
    spelt = TokenBytes(model.tokenizer, model.vocabulary.size).spelt
    mass = dict.fromkeys(spelt, 0.0)
    for token, share in enumerate(q):
        mass[spelling.spelt[token][:1]] += float(share)
    for token, one in enumerate(spelt):
        assert law[token] == pytest.approx(mass[one], abs=1e-6), one


@pytest.mark.parametrize(
    ("begun", "byte"), [("President Bush said the Pres", "i"), ("Oil pric", "e"), ("The White Hou", "s")]
)
def test_inside_a_token_of_the_small_model_its_end_is_likeliest(begun: str, byte: str) -> None:
    """The small model itself has never seen such a beginning cut into tokens."""
    model = in_bytes()
    law = law_after(model, ids_of(model, begun))
    assert law[model.tokenizer.token_to_id(byte)] > 0.9


def test_in_its_own_vocabulary_the_law_stays_nearly_what_it_is() -> None:
    model = Translated(large(), spoken_at(LLM))
    distances = []
    for item in load_items()[:4]:
        ids = ids_of(large(), item.text)[:60]
        ours, own = (
            m.forward([DecoderInput(m.empty_cache(), ids)])[0].logits.astype(np.float64) for m in (model, large())
        )
        own -= np.log(np.exp(own).sum(axis=1, keepdims=True))
        distances += list(0.5 * np.abs(np.exp(ours) - np.exp(own)).sum(axis=1))
    assert np.mean(distances) < 0.02


def test_a_text_longer_than_the_small_models_context_goes_on_with_its_end() -> None:
    model = Translated(Decoder.load(LLM), retrained())
    ids = ids_of(model, " ".join(item.text for item in load_items()[:30]))[: model.info.context]
    assert len(ids) == model.info.context == large().info.context
    assert len(ids_of(large(), model.tokenizer.decode(ids[1:]))) < len(ids)
    backwards = ids_of(model, model.tokenizer.decode(ids[:0:-1]))[: model.info.context]
    for text in (ids, backwards):
        assert len(model._text(tuple(text)).small) <= large().info.context
        assert law_after(model, text).sum() == pytest.approx(1.0)


def test_control_tokens_keep_their_meaning_and_no_text_becomes_one() -> None:
    model = in_words()
    assert model._text((END, END)).small == (END, END)
    name = model.tokenizer.id_to_token(END)
    named = model._text(tuple(ids_of(model, name))).small
    assert named[0] == END
    assert END not in named[1:]
    assert large().tokenizer.decode(list(named)) == name
    assert model.info.eos_ids == (END,)
    topic = model.forward([DecoderInput(model.empty_cache(), ids_of(model, "Stocks fall\nTopic: Business"), 1)])[0]
    assert int(np.argmax(topic.logits[-1])) == END


def test_the_end_of_a_text_is_known_by_what_it_does_and_not_by_its_name() -> None:
    renamed = Tokenizer.from_str(byte_tokenizer().to_str().replace(END_OF_TEXT, "<|done|>"))
    model = Translated(large(), spoken_by(renamed))
    assert model._text((END, END)).small == (END, END)
    ids = [END, *ids_of(model, "Stocks fall\nTopic: Business")]
    assert int(np.argmax(law_after(model, ids))) == END


def test_a_word_that_the_large_tokenizer_would_cut_otherwise_counts_for_nothing() -> None:
    model = Translated(large(), spoken_at(LLM))
    go, g, ov, vernment = (model.tokenizer.token_to_id(piece) for piece in ("Go", "G", "ov", "vernment"))
    assert model._next_id(model._text((END, go)), b"Governmental") == vernment
    assert model._next_id(model._text((END, g, ov)), b"Governmental") is None


@settings(max_examples=200)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_bytes_come_back_from_their_ids(text: bytes) -> None:
    for spelling in (in_words()._theirs, in_bytes()._theirs, in_words()._ours):
        assert b"".join(spelling.spelt[token] for token in spelling.cut(text)) == text


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentence_pieces_spaces_and_bytes_are_read(prefixed: bool) -> None:
    """With a space before every text, as Llama 2 has it, and without one, as Gemma has it."""
    words = ["\u2581", "t", "h", "e", "he", "\u2581t", "\u2581the"]
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0] * 257 + [-1.0, -2.0, -3.0, -4.0, 3.0, 2.0, 4.0],
        "tokenizer.ggml.token_type": [3, *[6] * 256, *[1] * 7],
        "tokenizer.ggml.add_space_prefix": prefixed,
    }
    spelling = TokenBytes(tokenizer_of(Gguf(LLM, metadata, 0)), len(texts))
    the = texts.index("\u2581the")
    assert spelling.spelt[:2] + spelling.spelt[the:] == [b"", b"\0", b" the"]
    assert spelling.cut(b" the the") == [the, the]
    for text in (b"the", " \N{ROCKET} the".encode(), b"  the the", b"\xf0\x9f\x9a"):
        assert b"".join(spelling.spelt[token] for token in spelling.cut(text)) == text


def test_the_same_ids_need_no_translation() -> None:
    assert in_ids_of(str(LLM), large()) is in_ids_of("", large()) is large()


def test_a_hugging_face_folder_without_weights_is_enough(tmp_path: Path) -> None:
    save_tokenizer(retrained().tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 7]}')
    found = in_ids_of(str(tmp_path), large())
    assert isinstance(found, Translated)
    assert found.vocabulary == retrained().vocabulary
    assert (found.info.bos_id, found.info.eos_ids) == (END, (0, 7))


def test_a_target_without_a_tokenizer_is_told_by_its_key() -> None:
    with pytest.raises(
        ConfigError, match=r"^agent.target_tokenizer must be a folder .* \(got '/nowhere': .*tokenizer.json is"
    ):
        configured_target("/nowhere")


def test_words_that_are_not_written_in_bytes_are_refused() -> None:
    from tokenizers import decoders, models

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="decoder of a tokenizer must be ByteLevel or that of SentencePiece"):
        Translated(large(), Spoken(tokenizer, vocabulary_in(tokenizer.to_str(), LLM), None, (0,)))
