"""The demo as a user runs it: real processes, a table, JSON, a clean stop, and errors that say what to do."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedhlm.errors import ConfigError, DataMissing
from fedhlm.settings import DEFAULT_PRESET
from fedhlm_fleet.demo.asking import load_prompts, tasks_of
from fedhlm_fleet.demo.run import AGENTS, CLUSTERS, COMPARED, COMPARED_ITEMS, Demo
from fedhlm_zoo.corpus import Article
from tests.processes import marked, obey_interrupts, until_gone

DOCUMENTED = set(re.findall(r"`(\w+)`", (Path(__file__).parents[3] / "docs" / "demo.md").read_text("utf-8")))
STORY = (
    "A fleet starts.",
    "The run: all agents write for 7 s under preset budget.",
    "m(u), learnt from the LLM's verdicts",
    "The run is over.",
    "threshold tau 0.",
    "budget 0.2",
    "The comparison:",
    "Under preset exact: ",
    "Under preset hlm: ",
    "The check:",
    "The truth:",
    "uplink messages per token",
    "What came of it",
    "exact wrote the LLM's own text token for token",
    "The words of the table",
)
GOING = re.compile(r" *[0-9.]+ s  tokens [0-9]")
PARTS = 1 + 1 + CLUSTERS * (1 + AGENTS)  # broker, cloud, edges, agents
COMMAND = [sys.executable, "-m", "fedhlm_fleet.cli", "demo"]


OWN_PRESET = """
promise = "keeps what is not very doubtful"
[generation]
gate = "threshold"
threshold = "fixed"
tau = 0.6
[generation.pipeline]
kind = "blocking"
window = 4
block = 4
"""


def measured(tmp_path: Path, *arguments: str, duration_s: int = 4) -> tuple[dict[str, Any], str]:
    """The JSON and the printed text of a demo that must succeed."""
    out = tmp_path / "result.json"
    options = ["--duration", str(duration_s), "--tokens", "16", "--seed", "3", "--json", str(out), *arguments]
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=240, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(out.read_bytes())
    for column in (report, *report["comparisons"]):
        assert column.keys() <= DOCUMENTED
        assert column["failed"] == 0
        assert column["tokens"] == sum(column["tokens_by_source"].values()) > 0
        assert set(column["topic_accuracy"]) == {"slm", "system", "llm"}
    return report, done.stdout


def checked_comparisons(report: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The comparisons by preset: all asked the same, and the two lossless ones are what they promise."""
    comparisons = {c["preset"]: c for c in report["comparisons"]}
    assert list(comparisons) == [name, *(p for p in COMPARED if p != name)]
    assert {c["requests"] for c in comparisons.values()} == {2 * COMPARED_ITEMS}
    assert comparisons["exact"]["mismatches"] == 0
    assert comparisons["exact"]["exact_match"] == 1.0
    assert comparisons["exact"]["uplink_bytes_per_token"] < 0.1 * comparisons["hlm"]["uplink_bytes_per_token"]
    assert comparisons["hlm"]["round_trips_per_token"] == pytest.approx(1.0, abs=0.01)
    assert comparisons["hlm"]["identical_to_llm"] == 1.0  # greedy: nothing is drawn
    return comparisons


@pytest.mark.slow
def test_the_default_shows_the_whole_journey(tmp_path: Path) -> None:
    report, printed = measured(tmp_path, "--budget", "0.2", "--truth", duration_s=7)
    assert report["preset"] == DEFAULT_PRESET
    assert report["budget"] == 0.2
    comparisons = checked_comparisons(report, DEFAULT_PRESET)
    assert set(report["rounds"]) == {"cluster-1", "cluster-2", "all"}
    assert min(report["rounds"].values()) >= 1
    assert report["tau_end"] > report["tau_start"] == 0.0  # nothing is known at first
    assert comparisons[DEFAULT_PRESET]["tau_start"] > 0.0  # and what was learnt is still known
    assert report["tokens_by_source"]["local"] > 0
    assert 0.0 <= report["risk"] <= report["risk_limit"] <= 1.0
    every = report["truth"][-1]
    assert (every["agent"], every["ever_above"]) == ("all", False)
    assert 0.0 <= every["truth"] <= every["risk_limit"]
    assert every["kept"] > 0
    told = [" ".join(printed.split()).find(words) for words in STORY]
    assert -1 not in told
    assert told == sorted(told), "in the order in which it happens"
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.slow
def test_a_preset_file_of_one_s_own_on_news_of_one_s_own(tmp_path: Path) -> None:
    preset = tmp_path / "exact.toml"  # named like a shipped one, which is another
    preset.write_text(OWN_PRESET, "utf-8")
    report, printed = measured(tmp_path, "--preset", str(preset), "--alpha", "0.1")
    comparisons = checked_comparisons(report, "exact.toml")
    for column in (report, comparisons["exact.toml"]):
        assert column["tau_start"] == column["tau_end"] == 0.6
        assert 0 < column["tokens_by_source"]["local"] < column["tokens"]
    assert report["alpha"] == 0.1
    assert report["skew"] > 0.3
    assert f"skew {report['skew']:.2f}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["llm-only", "slm-only"])
def test_the_baselines_are_what_they_promise(preset: str, tmp_path: Path) -> None:
    report, _ = measured(tmp_path, "--preset", preset)
    checked_comparisons(report, preset)
    assert report["tokens_by_source"]["local" if preset == "slm-only" else "cloud"] == report["tokens"]
    if preset == "llm-only":
        assert report["identical_to_llm"] >= 0.999
    else:
        assert report["uplink_bytes_per_token"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_prints_the_table_so_far_and_leaves_no_process(number: int, tmp_path: Path) -> None:
    marker = f"demo-test-{os.getpid()}-{number}"
    out = tmp_path / "result.json"
    with subprocess.Popen(
        [*COMMAND, "--duration", "60", "--console", "--json", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DEMO_TEST_MARKER": marker, "PYTHONUNBUFFERED": "1"},
        preexec_fn=obey_interrupts,  # noqa: PLW1509 - no threads here
    ) as process:
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://127.0.0.1:\d+/", line)))
        assert any(GOING.match(line) for line in process.stdout)  # something was written by then
        shown = httpx.get(f"{address}state", trust_env=False).json()
        assert len([part for part in shown["parts"] if part["online"]]) == 1 + CLUSTERS * (1 + AGENTS)
        assert shown["texts"], "the page shows what the fleet writes"
        process.send_signal(number)
        printed, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "uplink bytes per token" in printed
    report = json.loads(out.read_bytes())
    assert report["stopped_early"] is True
    assert report["tokens"] > 0
    assert report["comparisons"] == []
    assert until_gone(marker) == []


@pytest.mark.slow
def test_a_demo_that_is_killed_leaves_no_process() -> None:
    marker = f"demo-test-{os.getpid()}-killed"
    with subprocess.Popen(
        [*COMMAND, "--duration", "60"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "DEMO_TEST_MARKER": marker, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        assert any(GOING.match(line) for line in process.stdout)
        assert len(marked(marker)) == 1 + PARTS
        process.kill()
    assert until_gone(marker) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "exakt"], "did you mean 'exact'"),
        (["--prompts", "nowhere.txt"], "'nowhere.txt'"),
        (["--json", "nowhere/x.json"], "--json must be a writable file (got 'nowhere/x.json': No such file"),
        (["--broker", "mqtt://127.0.0.1:1"], "mqtt://127.0.0.1:1 not reached"),
        (["--broker", "http://x"], "broker.url must be mqtt://"),
        (["--tokens", "0"], "tokens"),
        (
            ["--preset", "exact", "--budget", "0.1"],
            "generation.budget must be left to a preset with generation.threshold",
        ),
        (["--budget", "2"], "--budget must be a number above 0 up to 1 (got '2')"),
        (["--alpha", "inf"], "--alpha must be a number above 0 (got 'inf')"),
        (["--alpha", "0"], "--alpha must be a number above 0 (got '0')"),
        (["--preset", "nowhere.toml"], "file must be a readable TOML file (got 'nowhere.toml'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], words: str) -> None:
    env = {**os.environ, "FEDHLM_BROKER__CONNECT_TIMEOUT_S": "1"}
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_demo_without_one_answer_says_so_and_promises_nothing(tmp_path: Path) -> None:
    prompts, out = tmp_path / "long.txt", tmp_path / "result.json"
    prompts.write_text("Oil prices rise again " * 400 + "\n")  # more than the model's context
    options = ["--prompts", str(prompts), "--duration", "1", "--json", str(out)]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(out.read_bytes())
    assert report["failed"] == report["requests"] > 0
    assert report["exact_match"] is None
    assert "equal to LLM only" not in done.stdout
    assert "were not in the run" not in done.stdout  # the one prompt is asked again
    assert "requests failed, the first of them: prompt must be shorter than the model's context" in " ".join(
        done.stdout.split()
    )


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


def demo(**options: Any) -> Demo:
    given = {"preset": "exact", "prompts": None, "tokens": 4, "seed": 0, "broker": "", "duration_s": 1.0}
    return Demo(**{**given, **options})


def test_without_topics_the_news_cannot_be_shared_out_by_topic(tmp_path: Path) -> None:
    titles = tmp_path / "titles.txt"
    titles.write_text("Oil rises\n")
    with pytest.raises(ConfigError, match=r"--alpha must be used with prompts that have topics"):
        demo(prompts=titles, alpha=0.1)


def test_what_is_compared_was_not_in_the_run() -> None:
    made = demo()
    assert all(isinstance(a, Article) for a in made.articles)
    assert len(made.compared) == COMPARED_ITEMS
    assert not set(made.compared) & set(made.articles)
    assert made.report is None


def test_a_short_list_is_asked_in_the_run_and_compared(tmp_path: Path) -> None:
    titles = tmp_path / "titles.txt"
    titles.write_text("Oil rises\nRain falls\n")
    made = demo(prompts=titles)
    assert made.articles == made.compared
    assert [a.title for a in made.articles] == ["Oil rises", "Rain falls"]


@pytest.mark.parametrize("alpha", [0.1, 10.0])
def test_every_item_belongs_to_one_agent(alpha: float) -> None:
    made = demo(alpha=alpha)
    assert made.parts is not None
    assert sorted(i for part in made.parts for i in part) == list(range(len(made.articles)))
    assert len(made.parts) == len(made.places)
    shares = made.shares()
    asked = [task for place in made.places for task in shares[place]]
    assert len({task.seed for task in asked}) == len(asked)
    assert {t.text for t in asked} == {t.text for t in tasks_of(made.articles, 4)}


def test_small_alpha_skews_more_than_large() -> None:
    skews = [demo(alpha=alpha).skew for alpha in (0.1, 1.0, 100.0)]
    assert None not in skews
    assert skews == sorted(skews, key=lambda s: -(s or 0.0))
    assert demo().skew is None


def test_without_alpha_all_agents_take_from_one_list() -> None:
    made = demo()
    (shared,) = {id(tasks): tasks for tasks in made.shares().values()}.values()
    assert list(shared) == list(tasks_of(made.articles, 4))
