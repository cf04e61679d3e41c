"""`fedhlm trace`: what each command prints and writes, and what it says of wrong files and cut ones."""

import csv
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedhlm.protocol.messages import Output
from fedhlm_fleet.cli import main
from fedhlm_traces.decoded import look
from fedhlm_traces.edit import save
from fedhlm_traces.file import Record, read
from fedhlm_traces.story import stories
from tests.fedhlm_traces.told import Told, told

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run() -> Told:
    return told("budget", seed=1, journal=True)


@pytest.fixture
def file(run: Told, tmp_path: Path) -> Path:
    path = tmp_path / "run.trace"
    save(path, run.header, run.records)
    return path


def lines_of(capsys: Capture, *arguments: object, code: int = 0) -> list[str]:
    assert main(["trace", *map(str, arguments)]) == code
    return capsys.readouterr().out.splitlines()


def test_show_has_a_line_for_every_message(run: Told, file: Path, capsys: Capture) -> None:
    lines = lines_of(capsys, "show", file)
    assert len(lines) == len(run.records)
    for line, record in zip(lines, run.records, strict=True):
        assert f"{record.at_s:.3f}" in line
        assert record.topic.removeprefix("fedhlm/1/") in line
        assert f" {len(record.payload)} B" in line


def test_show_selects_by_time_topic_agent_and_number(run: Told, file: Path, capsys: Capture) -> None:
    lines = lines_of(
        capsys, "show", file, "--from", 1.1, "--until", 1.5, "--topics", "c/+/a/+/verdict", "c/+/escalate/#"
    )
    wanted = [r for r in run.records if 1.1 <= r.at_s < 1.5 and ("/verdict" in r.topic or "/escalate/" in r.topic)]
    assert len(lines) == len([r for r in wanted if "/cloud/" not in r.topic]) > 0
    bobs = lines_of(capsys, "show", file, "--agent", "bob")
    assert bobs
    assert all("bob" in line for line in bobs)
    assert lines_of(capsys, "show", file, "--limit", 3) == lines_of(capsys, "show", file)[:3]


def test_show_of_a_request_shows_its_prompt_blocks_verdicts_and_outputs(run: Told, file: Path, capsys: Capture) -> None:
    lines = lines_of(capsys, "show", file, "--request", "r-bob-1")
    assert "Prompt" in lines[0]
    assert "ended: " in lines[-1]
    assert not any("r-bob-0" in line or "r-bob-2" in line or "/ann/" in line for line in lines)
    outputs = [
        m for r in run.records if isinstance(m := look(r, "fedhlm/1").message, Output) and m.request == "r-bob-1"
    ]
    assert sum(" Output " in line for line in lines) == len(outputs)


def test_foreign_and_broken_payloads_are_lines_too(run: Told, tmp_path: Path, capsys: Capture) -> None:
    odd = [Record(0.0, 0, "else/\x1b[31m", b"\xff"), Record(0.1, 0, "fedhlm/1/cloud/status", b"\xc1")]
    save(tmp_path / "odd", run.header, odd)
    foreign, broken = lines_of(capsys, "show", tmp_path / "odd")
    assert "foreign" in foreign
    assert "\x1b" not in foreign
    assert "refused" in broken
    assert "is not a message" in broken


def test_story_tells_every_token(run: Told, file: Path, capsys: Capture) -> None:
    lines = lines_of(capsys, "show", file, "--story")
    tokens = sum(len(deed.facts) for deed in run.deeds.values())
    assert sum(line.startswith("  token ") for line in lines) == tokens
    assert sum(line.startswith("request ") for line in lines) == len(run.deeds)
    one = lines_of(capsys, "show", file, "--story", "--request", "r-ann-0")
    (story,) = [s for s in stories(run.records, run.header) if s.request == "r-ann-0"]
    assert len(one) == 1 + len(story.steps)
    first = lines_of(capsys, "show", file, "--story", "--limit", 1)
    assert [line.startswith("request ") for line in first] == [True] + [False] * (len(first) - 1)


def test_texts_of_tokens_need_their_own_tokenizer(file: Path, tmp_path: Path, capsys: Capture) -> None:
    from tests.fedhlm_traces.told import tokenizer

    # The shipped tokenizer is not the toy models': nothing is shown that the tokens do not mean.
    assert not any("'" in line for line in lines_of(capsys, "show", file, "--story") if line.startswith("  token"))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    lines = lines_of(capsys, "show", file, "--story", "--tokenizer", tmp_path)
    assert all("'" in line for line in lines if line.startswith("  token"))


def test_stats_are_json_or_a_table(run: Told, file: Path, capsys: Capture) -> None:
    assert main(["trace", "stats", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["messages"] == len(run.records)
    assert found["total"]["uplink_bytes"] == found["uplink_bytes_reported"]
    table = "\n".join(lines_of(capsys, "stats", file))
    assert f"{found['total']['uplink_bytes']:,}" in table
    part = json.loads("\n".join(lines_of(capsys, "stats", file, "--json", "--agent", "ann")))
    assert set(part["agents"]) == {"ann"}


def test_cut_and_merge_give_the_recording_again(run: Told, file: Path, tmp_path: Path, capsys: Capture) -> None:
    middle = run.records[len(run.records) // 2].at_s
    lines_of(capsys, "cut", file, tmp_path / "a", "--until", middle)
    lines_of(capsys, "cut", file, tmp_path / "b", "--from", middle)
    (told_,) = lines_of(capsys, "merge", tmp_path / "a", tmp_path / "b", tmp_path / "again")
    assert f"{len(run.records):,} messages" in told_
    assert list(read(tmp_path / "again")) == run.records


def test_export_to_a_file_and_to_the_output_are_the_same(
    run: Told, file: Path, tmp_path: Path, capsys: Capture
) -> None:
    for kind in ("jsonl", "csv"):
        assert main(["trace", "export", str(file), "--format", kind]) == 0
        printed = capsys.readouterr().out
        assert main(["trace", "export", str(file), "--format", kind, "--out", str(tmp_path / kind)]) == 0
        assert (tmp_path / kind).read_bytes().decode() == printed
    assert len((tmp_path / "jsonl").read_text("utf-8").splitlines()) == len(run.records)
    assert len(list(csv.reader(io.StringIO((tmp_path / "csv").read_text("utf-8"))))) == 1 + len(run.records)


def test_import_says_what_was_lost_and_leaves_no_file(tmp_path: Path, capsys: Capture) -> None:
    plain = tmp_path / "plain"
    whole = b'{"tst":1.5,"topic":"a","qos":0,"retain":0,"payloadlen":1,"payload":"x"}\n'
    plain.write_bytes(whole + b'{"tst":2,"topic":"a","qos":0,"retain":0,"payloadlen":9,"payload":"cut"}\n')
    assert main(["trace", "import", str(plain), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "1 of 2 lines lost bytes" in error
    assert "--lossy" in error
    assert not (tmp_path / "out").exists()
    assert main(["trace", "import", str(plain), str(tmp_path / "out"), "--lossy"]) == 0
    assert "1 of 2 lines lost bytes" in capsys.readouterr().err
    assert [r.payload for r in read(tmp_path / "out")] == [b"x", b"cut"]


def test_import_reads_the_standard_input(tmp_path: Path) -> None:
    line = b'{"tst":1.5,"topic":"a","qos":0,"retain":0,"payloadlen":1,"payload":"x"}\n'
    command = [sys.executable, "-m", "fedhlm_fleet.cli", "trace", "import", "-", str(tmp_path / "out")]
    done = subprocess.run(command, input=line * 3, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(read(tmp_path / "out"))) == 3


@pytest.mark.parametrize("command", ["show", "stats", "export"])
def test_a_cut_recording_is_read_to_its_last_whole_frame(
    command: str, run: Told, tmp_path: Path, capsys: Capture
) -> None:
    from fedhlm_traces.file import Writer

    path = tmp_path / "cut.trace"
    with Writer(path, run.header, flush_bytes=2_000) as writer:
        for record in run.records:
            writer.write(record)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 100])
    assert main(["trace", command, str(path)]) == 0
    captured = capsys.readouterr()
    assert "hold no whole frame" in captured.err
    assert captured.out


WRONG: list[tuple[list[str], str]] = [
    (["show", "absent"], "absent"),
    (["stats", "text"], "a recording of format"),
    (["export", "text"], "a recording of format"),
    (["show", "good", "--from", "5", "--until", "2"], "--until must be later than --from 5 (got 2)"),
    (["show", "good", "--topics", "a/#/b"], "--topics"),
    (["show", "good", "--request", "nobody"], "--request must be the name of a request"),
    (["show", "good", "--story", "--request", "nobody"], "--request must be the name of a request"),
    (["show", "good", "--story", "--tokenizer", "nowhere"], "nowhere"),
    (["cut", "good", "text"], "exists"),
    (["merge", "good"], "(got 1)"),
    (["merge", "good", "text", "out"], "a recording of format"),
    (["merge", "good", "good", "text"], "exists"),
    (["export", "good", "--out", "text"], "exists"),
    (["export", "good", "--out", "nowhere/out"], "must be a writable file"),
    (["export", "good", "--format", "xml"], "xml"),
    (["import", "absent", "out"], "absent"),
    (["import", "text", "out"], "lines lost bytes"),
    (["import", "good", "out"], "lines lost bytes"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], words: str, run: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "good", run.header, itertools.islice(run.records, 50))
    (tmp_path / "text").write_text("no recording\n", "utf-8")
    assert main(["trace", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
