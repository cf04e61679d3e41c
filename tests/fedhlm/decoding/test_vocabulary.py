"""Two tokenizers agree where every id means the same, however their files are written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.decoding.vocabulary import TOKENIZER_FILE, Vocabulary, vocabulary_of
from fedhlm.errors import ModelError
from fedhlm_zoo.shipped import model_folder

texts = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=12, unique=True)
Document = dict[str, Any]


def bpe(names: list[str]) -> Document:
    return {
        "version": "1.0",
        "added_tokens": [{"id": len(names), "content": "<|end|>", "special": True}],
        "decoder": {"type": "ByteLevel", "trim_offsets": True},
        "model": {"type": "BPE", "vocab": {text: number for number, text in enumerate(names)}, "merges": []},
    }


def read(folder: Path, document: object, **style: Any) -> Vocabulary:
    (folder / TOKENIZER_FILE).write_text(json.dumps(document, **style), encoding="utf-8")
    return vocabulary_of(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@given(names=texts, cut=st.text(max_size=5))
def test_a_file_written_anew_is_the_same_vocabulary(folder: Path, names: list[str], cut: str) -> None:
    """Another order, other spaces, another escape, other rules of how a text is cut."""
    before = read(folder, bpe(names))
    document = bpe(names) | {"pre_tokenizer": {"type": "Split", "pattern": cut}, "version": "2.0"}
    document["model"]["vocab"] = dict(reversed(document["model"]["vocab"].items()))
    document["model"]["merges"] = [["a", "b"]]
    assert read(folder, dict(reversed(document.items())), indent=1, ensure_ascii=False) == before
    assert before.size == len(names) + 1
    assert len(before.digest) == 16


@given(names=texts)
def test_unigram_models_list_their_tokens_by_id(folder: Path, names: list[str]) -> None:
    listed = bpe(names)
    listed["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[name, -1.5] for name in names]}
    assert read(folder, listed) == read(folder, bpe(names))


def renamed(document: Document) -> None:
    document["model"]["vocab"]["other"] = document["model"]["vocab"].pop("a")


def swapped(document: Document) -> None:
    document["model"]["vocab"] |= {"a": 1, "b": 0}


def joined(document: Document) -> None:
    document["decoder"] = {"type": "Metaspace"}


def ended(document: Document) -> None:
    document["added_tokens"][0]["content"] = "</s>"


def longer(document: Document) -> None:
    document["added_tokens"].append({"id": 9, "content": "<tool>"})


@pytest.mark.parametrize("change", [renamed, swapped, joined, ended, longer])
def test_another_meaning_of_an_id_is_another_vocabulary(folder: Path, change: Callable[[Document], None]) -> None:
    document = bpe(["a", "b", "c"])
    before = read(folder, document)
    change(document)
    assert read(folder, document).digest != before.digest


def test_ids_reach_to_the_largest_one(folder: Path) -> None:
    document = bpe(["a"])
    document["added_tokens"].append({"id": 151_664, "content": "<|fim|>"})
    assert read(folder, document).size == 151_665


@pytest.mark.parametrize(
    "broken",
    [[], {}, {"model": {}}, {"model": {"vocab": {}}}, {"model": {"vocab": {"a": -1}}}, {"model": {"vocab": 3}}],
)
def test_what_is_no_tokenizer_is_refused_with_its_name(folder: Path, broken: object) -> None:
    with pytest.raises(ModelError, match=f"{TOKENIZER_FILE} must be a tokenizer"):
        read(folder, broken)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        vocabulary_of(tmp_path)


def test_the_shipped_pair_shares_its_vocabulary() -> None:
    slm, llm = (vocabulary_of(model_folder("", name)) for name in ("slm", "llm"))
    assert slm == llm
    assert slm.size == 4_096
