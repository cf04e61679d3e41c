"""GGUF files without llama.cpp: their metadata, what their ids mean, and how they write a conversation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhlm.decoding import gguf
from fedhlm.decoding.chat import chat_of
from fedhlm.decoding.gguf import digest_of, read_gguf
from fedhlm.decoding.gguf_tokenizer import SPACE, tokenizer_of, tokens_of
from fedhlm.decoding.vocabulary import vocabulary_in, vocabulary_of
from fedhlm.errors import ModelError
from fedhlm_zoo.shipped import model_folder
from tests.fedhlm.decoding.conformance import TEXTS
from tests.fedhlm.decoding.ggufs import TEMPLATE, metadata_of_shipped, tiny_gguf, write_gguf

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, "a", "b", "ab", f"{SPACE}ab", "c"]


def sentence_piece(**others: Any) -> dict[str, Any]:
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0, -3.0]
    types = [2, 3, 3, *([6] * 256), *([1] * 6)]
    keys = {"tokenizer.ggml.tokens": PIECES, "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types}
    return {"general.architecture": "llama", "tokenizer.ggml.model": "llama", **keys, **others}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_its_ids_mean_what_those_of_the_same_tokenizer_in_a_folder_mean(tiny: Path) -> None:
    tokenizer = tokenizer_of(read_gguf(tiny))
    shipped = model_folder("", "slm")
    assert vocabulary_in(tokenizer.to_str(), tiny) == vocabulary_of(shipped)
    from tokenizers import Tokenizer

    other = Tokenizer.from_file(str(shipped / "tokenizer.json"))
    other.encode_special_tokens = True
    for text in (*TEXTS, "<|endoftext|>", "12 345\n\n x  "):
        assert tokenizer.encode(text, add_special_tokens=False).ids == other.encode(text, add_special_tokens=False).ids


def test_unused_ids_at_the_end_pad_the_table(tmp_path: Path) -> None:
    metadata = metadata_of_shipped()
    texts = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [*texts, "[PAD1]", "[PAD2]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    padded = read_gguf(write_gguf(tmp_path / "padded.gguf", metadata, {}))
    assert tokens_of(padded)[0] == texts


@pytest.mark.parametrize("prefixed", [True, False])
def test_pieces_with_scores_become_merges_and_other_characters_bytes(tmp_path: Path, prefixed: bool) -> None:
    metadata = sentence_piece(**{"tokenizer.ggml.add_space_prefix": prefixed})
    tokenizer = tokenizer_of(read_gguf(write_gguf(tmp_path / "pieces.gguf", metadata, {})))
    ids = tokenizer.encode("ab é<s>", add_special_tokens=False).ids
    shown = [PIECES[number] for number in ids]
    assert shown[: 2 if prefixed else 3] == ([f"{SPACE}ab", SPACE] if prefixed else ["ab", SPACE, "<0xC3>"])
    assert "<s>" not in shown  # its name in a text stays text
    assert tokenizer.decode(ids) == "ab é<s>"


def test_its_template_writes_a_conversation(tiny: Path) -> None:
    chat = chat_of(tiny)
    assert chat is not None
    assert chat.template == TEMPLATE
    assert chat.special["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"must be a GGUF file, which begins with b'GGUF' \(got b''\)"),
        (b"PK\x03\x04 zip", r"must be a GGUF file, which begins with b'GGUF' \(got b'PK"),
        (b"GGUF\x01\0\0\0", r"must be a GGUF file of version 2 or 3 \(got 1\)"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 40, "its metadata has a count of"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_gguf(path)


@pytest.mark.parametrize("kept", [5, 100, 5_000])
def test_a_file_that_ends_in_its_metadata_is_refused(tiny: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"must be a whole GGUF file \(it ends after"):
        read_gguf(path)


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be read \(No such file or directory\)"):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", "bert", r"tokenizer.ggml.model of .* must be one of gpt2, llama \(got 'bert'\)"),
        ("tokenizer.ggml.pre", "unheard", r"tokenizer.ggml.pre of .* must be one of .*smollm.* \(got 'unheard'\)"),
        ("tokenizer.ggml.tokens", [], "must list its tokens"),
        ("tokenizer.ggml.tokens", "text", r"must be a list \(got 'text'\)"),
        ("tokenizer.ggml.merges", ["none of them"], "the tokenizer of .* cannot be used"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", metadata_of_shipped() | {key: value}, {})
    with pytest.raises(ModelError, match=message):
        tokenizer_of(read_gguf(path))


@pytest.mark.parametrize("whole", [True, False])
def test_other_weights_have_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    if not whole:
        monkeypatch.setattr(gguf, "HASH_UP_TO_BYTES", 0)
        monkeypatch.setattr(gguf, "SAMPLE_BYTES", 4096)
    path = tiny_gguf(tmp_path / "model.gguf")
    before = digest_of(read_gguf(path))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert digest_of(read_gguf(path)) != before
    data[-1] ^= 1
    path.write_bytes(data)
    assert digest_of(read_gguf(path)) == before


def test_damaged_metadata_is_told_whatever_the_damage(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", sentence_piece(), {})
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)] if rng.random() < 0.3 else data)
        try:
            tokenizer_of(read_gguf(path)).encode("ab é", add_special_tokens=False)
        except ModelError:
            refused += 1
    assert refused > 100
