"""The demo as a user runs it: real processes, a table, JSON, a clean stop, and errors that say what to do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedhlm.errors import ConfigError, DataMissing
from fleet.demo import Demo, load_prompts, tasks_of
from fleet.report import Alternatives, Generated, figures
from model_zoo.corpus import Article
from tests.processes import obey_interrupts

DOCUMENTED = {
    "preset", "seed", "tokens", "tokens_by_source", "identical_to_llm", "topic_accuracy", "uplink_bytes_per_token",
    "uplink_messages_per_token", "round_trips_per_token", "tokens_per_second", "wall_s",
}  # fmt: skip
COMMAND = [sys.executable, "-m", "fleet.cli", "demo"]


def children_of(marker: str) -> list[str]:
    """Command lines of processes whose environment holds `marker`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["exact", "llm-only", "slm-only", "hlm"])
def test_the_demo_measures_what_it_promises(preset: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--preset", preset, "--duration", "4", "--tokens", "16", "--seed", "3", "--json", str(out)]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(out.read_bytes())
    assert report.keys() >= DOCUMENTED
    assert report["failed"] == 0
    assert report["tokens"] == sum(report["tokens_by_source"].values()) > 0
    assert report["tokens_by_source"]["local" if preset == "slm-only" else "cloud"] == report["tokens"]
    assert set(report["topic_accuracy"]) == {"slm", "system", "llm"}
    if preset in ("exact", "llm-only"):
        assert report["identical_to_llm"] >= 0.999
    if preset == "exact":
        assert report["uplink_bytes_per_token"] < 0.1 * report["comparison"]["uplink_bytes_per_token"]
    if preset == "slm-only":
        assert report["uplink_bytes_per_token"] == 0.0
    if preset == "hlm":
        assert report["comparison"] is None
        assert report["round_trips_per_token"] == pytest.approx(1.0, abs=0.01)
    assert "uplink bytes per token" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_prints_the_table_so_far_and_leaves_no_process(number: int, tmp_path: Path) -> None:
    marker = f"demo-test-{os.getpid()}-{number}"
    out = tmp_path / "result.json"
    with subprocess.Popen(
        [*COMMAND, "--duration", "60", "--json", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DEMO_TEST_MARKER": marker, "PYTHONUNBUFFERED": "1"},
        preexec_fn=obey_interrupts,  # noqa: PLW1509 - no threads here
    ) as process:
        assert process.stdout is not None
        assert "agent-" in process.stdout.readline()  # the first finished request
        process.send_signal(number)
        printed, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "uplink bytes per token" in printed
    assert json.loads(out.read_bytes())["stopped_early"] is True
    deadline = time.monotonic() + 10.0
    while children_of(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children_of(marker) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "exakt"], "did you mean 'exact'"),
        (["--prompts", "nowhere.txt"], "'nowhere.txt'"),
        (["--json", "nowhere/x.json"], "a file in an existing folder expected"),
        (["--broker", "mqtt://127.0.0.1:1"], "mqtt://127.0.0.1:1 not reached"),
        (["--broker", "http://x"], "broker.url is 'http://x'"),
        (["--tokens", "0"], "tokens"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], words: str) -> None:
    env = {**os.environ, "FEDHLM_BROKER__CONNECT_TIMEOUT_S": "1"}
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDHLM_CLOUD__MODEL", str(tmp_path / "none"))
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "none" in done.stderr
    assert "does not exist" in done.stderr


def test_prompt_files_of_both_kinds(tmp_path: Path) -> None:
    titles = tmp_path / "titles.txt"
    titles.write_text("Oil rises\n\n  Rain falls \n")
    assert [a.title for a in load_prompts(titles)] == ["Oil rises", "Rain falls"]
    assert [t.kind for t in tasks_of(load_prompts(titles), 8)] == ["continue", "continue"]
    items = tmp_path / "items.jsonl"
    items.write_text('{"title": "A", "text": "b", "topic": "World"}\n')
    assert [t.kind for t in tasks_of(load_prompts(items), 8)] == ["continue", "topic"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="at least one line"):
        load_prompts(tmp_path / "empty.txt")
    items.write_text('{"title": 3}\n')
    with pytest.raises(DataMissing, match="line 1"):
        load_prompts(items)


def test_figures_count_what_happened() -> None:
    def request(task: str, ids: list[int], text: str, sources: list[str]) -> Generated:
        return Generated(
            agent="a", task=task, prompt="p", topic="World", seed=1, max_tokens=4, ids=ids, text=text,
            sources=sources, finish="length", statistics={"uplink_bytes": 30.0, "uplink_messages": 1.0},
        )  # fmt: skip

    requests = [
        request("continue", [1, 2, 3], "abc", ["cloud", "cloud", "unverified"]),
        request("topic", [9], " World", ["cloud"]),
        Generated(agent="a", task="continue", prompt="p", topic="", seed=2, max_tokens=4),
    ]
    alone = {0: Alternatives([1, 2, 4], "abd", ""), 1: Alternatives([8], " Sports", " World")}
    result = figures("exact", 1, requests, alone, 2.0)
    assert (result.requests, result.tokens, result.mismatches) == (2, 4, 2)
    assert result.identical_to_llm == 0.5
    assert result.tokens_by_source == {"local": 0, "peer": 0, "neighbour": 0, "cloud": 3, "unverified": 1}
    assert (result.topic_accuracy.slm, result.topic_accuracy.system, result.topic_accuracy.llm) == (1.0, 1.0, 0.0)
    assert result.uplink_bytes_per_token == 15.0
    assert result.tokens_per_second == 2.0
    assert result.round_trips_per_token == 0.0


def test_items_are_articles() -> None:
    assert all(isinstance(a, Article) for a in load_prompts(None))
    assert Demo(preset="exact", prompts=None, tokens=4, seed=0, broker="", duration_s=1.0).report is None
