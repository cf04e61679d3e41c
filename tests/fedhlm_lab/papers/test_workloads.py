"""What texts are asked for: workloads on news items, prompts of a file, and what is said of what cannot be used."""

from pathlib import Path

import pytest

from fedhlm.errors import ConfigError, DataMissing, FedhlmError
from fedhlm_fleet.cli import main
from fedhlm_lab.papers.pair import LabPair, decoder_of, folder_pair
from fedhlm_lab.papers.workloads import WORKLOADS, PromptChoice, prompts_of, read_prompts
from fedhlm_zoo.prompts import load_items


@pytest.fixture(scope="module")
def pair() -> LabPair:
    return folder_pair()


@pytest.fixture(autouse=True)
def without_news(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shipped items, whatever the machine has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDHLM_DATA", raising=False)


def texts_of(pair: LabPair, ids: list[list[int]]) -> list[str]:
    return [str(decoder_of(pair).tokenizer.decode(one)).strip() for one in ids]


def test_a_file_has_lines_and_objects(pair: LabPair, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text('The first one\n\n{"prompt": "Two\\nlines"}\n')
    assert read_prompts(file) == ["The first one", "Two\nlines"]
    found = prompts_of(PromptChoice(file), pair, articles=9, needed=5, room=8)
    assert found.source == "2 prompts of mine.txt"
    assert texts_of(pair, list(found.ids)) == ["The first one", "Two\nlines"] * 2 + ["The first one"]


@pytest.mark.parametrize("workload", ["continue", "headline", "topic"])
def test_a_workload_asks_of_a_news_item(pair: LabPair, workload: str) -> None:
    found = prompts_of(PromptChoice(workload=workload), pair, articles=3, needed=2, room=24)
    item = load_items()[0]
    assert texts_of(pair, [found.ids[0]]) == [WORKLOADS[workload](item).strip()]
    assert (item.title in WORKLOADS[workload](item)) is (workload != "headline")


def test_a_long_article_leaves_room_for_its_text(pair: LabPair) -> None:
    context = decoder_of(pair).info.context
    found = prompts_of(PromptChoice(workload="topic"), pair, articles=5, needed=5, room=context - 10)
    assert {len(ids) for ids in found.ids} == {10}
    assert all(text.endswith("Topic:") for text in texts_of(pair, list(found.ids)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "--prompts must have one prompt a line"),
        (b"\n \n", "--prompts must have one prompt a line"),
        (b"good\n\xff\n", "--prompts must be UTF-8 text .*byte 5"),
        (b"good\n{]\n", "mine.txt line 2 must be a prompt, or a JSON object with the key prompt"),
        (b'{"text": "x"}\n', "mine.txt line 1 must be a prompt, or a JSON object with the key prompt"),
        (b'{"prompt": " "}\n', "mine.txt line 1 has an empty prompt"),
        (b"word " * 900, "prompt 1 of mine.txt must have at most 504 tokens"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(
    pair: LabPair, tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(DataMissing, match=words):
        prompts_of(PromptChoice(file), pair, articles=9, needed=5, room=8)


def test_what_cannot_be_asked_for_is_refused(pair: LabPair, tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="--prompts must be a readable file"):
        read_prompts(tmp_path / "absent")
    with pytest.raises(ConfigError, match="--workload must be one of continue, headline, topic, chat"):
        prompts_of(PromptChoice(workload="talk"), pair, articles=1, needed=1, room=8)
    with pytest.raises(FedhlmError, match="must have an LLM with a chat template"):
        prompts_of(PromptChoice(workload="chat"), pair._replace(llm_folder=tmp_path), articles=1, needed=1, room=8)
    with pytest.raises(FedhlmError, match="must have 900 articles"):
        prompts_of(PromptChoice(), pair, articles=900, needed=900, room=8)


def test_a_chat_is_written_with_the_template_of_the_llm(pair: LabPair, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %} <answer>"
    )
    found = prompts_of(
        PromptChoice(workload="chat"), pair._replace(llm_folder=folder), articles=1, needed=1, room=24
    )  # fmt: skip
    (text,) = texts_of(pair, list(found.ids))
    assert text.startswith("<user> Write a headline for this news item:")
    assert text.endswith("<answer>")


def test_a_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("")
    assert main(["lab", "pareto", "--prompts", "mine.txt", "--quick"]) == 2
    assert "--prompts must have one prompt a line" in capsys.readouterr().err
    assert main(["lab", "capacity", "--slm", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
