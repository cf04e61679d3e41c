"""The shipped news items, and files that are not news items."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedhlm.errors import DataMissing
from fedhlm_zoo.corpus import TOPICS
from fedhlm_zoo.prompts import load_items


def test_the_shipped_items_are_two_hundred_different_ones_fifty_a_topic() -> None:
    items = load_items()
    assert Counter(i.topic for i in items) == dict.fromkeys(TOPICS, 50)
    assert len({i.title for i in items}) == len({i.text for i in items}) == 200
    assert [i.topic for i in items[:4]] == list(TOPICS)
    assert all(15 <= len(i.title) <= 80 and 60 <= len(i.text) <= 300 for i in items)


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"title": " A ", "text": "B", "topic": "Sports"}\n\n{"title":"C","text":"","topic":"World"}\n')
    assert [(i.title, i.text, i.topic) for i in load_items(path)] == [("A", "B", "Sports"), ("C", "", "World")]


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b'{"title": "A", "text": "B"}',
        b'{"title": "A", "text": "B", "topic": "Weather"}',
        b'{"title": "A", "text": "B", "topic": "World", "extra": 1}',
        b'{"title": " ", "text": "B", "topic": "World"}',
        b'{"title": "\xff", "text": "B", "topic": "World"}',
    ],
)
def test_a_bad_line_is_reported_by_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"title": "A", "text": "B", "topic": "Sports"}\n\n' + line + b"\n")
    with pytest.raises(DataMissing, match=r"mine\.jsonl line 3 "):
        load_items(path)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"must be readable .got .*absent\.jsonl"):
        load_items(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataMissing, match="is empty"):
        load_items(tmp_path / "empty.jsonl")


def test_reading_prompts_loads_no_model_library() -> None:
    code = (
        "import sys; from fedhlm_zoo.prompts import load_items; load_items(); "
        "print(*sorted({'torch','onnx','onnxruntime','transformers','optimum','tokenizers','datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
