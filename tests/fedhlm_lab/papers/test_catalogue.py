"""The experiments from their files to their results, with the shipped pair on few shipped items, and their commands."""

from pathlib import Path
from typing import Any

import pytest

from fedhlm.errors import ConfigError
from fedhlm_fleet.cli import main
from fedhlm_lab.papers import catalogue
from fedhlm_lab.papers.experiment import Experiment, FedhlmExperiment, LabSample, ParetoExperiment, UhlmExperiment
from fedhlm_lab.papers.pair import folder_pair, paced
from fedhlm_lab.papers.report import markdown
from fedhlm_lab.papers.requests import source_of
from fedhlm_lab.sim import verifier_costs
from fedhlm_lab.sim.pace import ModelPace
from fedhlm_zoo.corpus import load_ag_news

FEW = {
    "fedhlm": {"articles": 4, "requests": 24, "clients": 3, "clusters": 2, "rounds": 2, "alphas": [10.0, 1.0, 0.1], "sample": 3, "seeds": 2},
    "u-hlm": {"articles": 3, "questions": 4, "rows": 3, "taus": [0.0, 0.43, 1.0], "vocabularies": [4096], "sample": 3, "seeds": 2},
    "pareto": {"presets": ["colocated", "slm-only", "budget"], "links": ["lte"], "seeds": 2, "warm": 2, "texts": 2, "tokens": 4},
    "capacity": {"presets": ["exact", "llm-only"], "agents": [1, 2], "seeds": 2, "warm": 1, "texts": 1, "tokens": 4, "prompts": 3},
    "ablations": {
        "links": ["lte"], "seeds": 2, "agents": 2,
        "workloads": {"topic": {"title": "topics", "warm": 2, "texts": 2, "tokens": 1}},
        "parts": [{"name": "peers", "preset": "fedhlm", "without": {"generation.peers": "none"}}],
    },
}  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Experiments of seconds, without AG News."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDHLM_DATA", raising=False)
    load = Experiment.load.__func__  # type: ignore[attr-defined]

    def smaller(cls: type[Experiment], name: str, sample: LabSample) -> Any:
        return load(cls, name, sample._replace(parameters={**FEW[name], **sample.parameters}))

    monkeypatch.setattr(Experiment, "load", classmethod(smaller))
    for name, value in (("BATCHES", (1, 2)), ("WIDTHS", (1,)), ("CONTEXTS", (4,)), ("REPEATS", 1)):
        monkeypatch.setattr(verifier_costs, name, value)


def test_a_command_writes_the_report_of_the_shipped_pair(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["lab", "fedhlm", "--out", "out", "--cache", "laws"]) == 0
    shown = capsys.readouterr().out
    assert "out/fedhlm/report.md" in shown
    assert catalogue.TOO_FEW in shown
    assert catalogue.QUICK not in shown
    assert "36 of 36 requests" in shown  # again in the simulator
    report = (tmp_path / "out" / "fedhlm" / "report.md").read_text()
    assert "fedhlm-news-slm@" in report
    assert "| Table III | local | 0.9449 |" in report
    assert len(list((tmp_path / "laws").iterdir())) == 1


def test_all_experiments_run_and_say_that_they_are_small(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert set(FEW) == set(catalogue.EXPERIMENTS)
    assert main(["lab", "all", "--quick", "--out", "out", "--cache", "laws"]) == 0
    shown = capsys.readouterr().out
    for name in FEW:
        text = (tmp_path / "out" / name / "report.md").read_text()
        assert catalogue.QUICK in text
        assert all((tmp_path / "out" / name / picture).is_file() for picture in pictures(text))
    assert "18 of 18 questions" in shown
    assert len(list((tmp_path / "laws").iterdir())) == 2  # the questions of both are the same


def pictures(report: str) -> list[str]:
    """The files of the pictures of a report."""
    found = [part.partition(")")[0] for part in report.split("](")[1:]]
    assert found
    return found


@pytest.mark.parametrize(
    ("name", "kind"), [("fedhlm", FedhlmExperiment), ("u-hlm", UhlmExperiment), ("pareto", ParetoExperiment)]
)
def test_a_shipped_experiment_is_read_and_its_smaller_sample_is_smaller(name: str, kind: type[Experiment]) -> None:
    whole, quick = kind.load(name), kind.load(name, LabSample(quick=True))
    assert quick.articles < whole.articles
    assert quick.paper == whole.paper
    assert all(value.tolerance > 0.0 for value in whole.paper)


def test_parameters_of_one_s_own_replace_those_of_the_file_and_the_report_names_them(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("mine.toml").write_text('links = ["lan"]\npresets = ["slm-only"]\n')
    assert main(["lab", "pareto", "--parameters", "mine.toml", "--out", "out", "--cache", "laws"]) == 0
    report = (tmp_path / "out" / "pareto" / "report.md").read_text()
    assert "- parameters of mine.toml: links, presets" in report
    assert [line for line in report.splitlines() if line.startswith("## On ")] == ["## On lan"]
    assert "`colocated`" not in report.partition("## On lan")[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agentz = [1, 2]", "agentz is not a known key: did you mean agents? (got [1, 2] from file mine.toml)"),
        ("xyzzy = 1", "xyzzy is not a known key: the keys are title, articles,"),
        ("agents = [0, 2]", "agents must be a value as in capacity.toml (got [0, 2] from file mine.toml: "),
        ("paper = []", "paper is not a known key: "),
        ("seeds = 1", "seeds must be a value as in capacity.toml (got 1 from file mine.toml: "),
        ('verifiers = {cpu = {cheaper = 0.5, batch_tokens = 8}}', "verifiers must be a value as in capacity.toml"),
        ("agents = ", "--parameters must be TOML (got 'mine.toml': "),
        (None, "--parameters must be a readable TOML file (got 'mine.toml': No such file or directory)"),
    ],
)  # fmt: skip
def test_impossible_parameters_are_told_in_one_line(
    text: str | None, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.toml").write_text(text)
    assert main(["lab", "capacity", "--parameters", "mine.toml"]) == 2
    told = capsys.readouterr().err
    assert words in told.replace("\n", " ")
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("pareto", {"tokens": 600}, "tokens must be below the 512 of the SLM's context (got 600)"),
        ("pareto", {"device_s": [0.0, 0.0]}, "device_s must be a value as in pareto.toml"),
        ("capacity", {"baseline": "hlm"}, "baseline must be one of exact, llm-only (got 'hlm')"),
        ("capacity", {"mixed": ["exact"], "long": 509}, "long must be at most 508"),
        ("capacity", {"verifiers": {"a/b": {"cheaper": 1.0, "batch_tokens": 8}}}, "verifiers must be a value as in"),
        ("fedhlm", {"requests": 5}, "requests must be at least 6, one for each client and round (got 5)"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit_one_another_are_told(
    name: str, changes: dict[str, Any], words: str, few: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as told:
        catalogue.EXPERIMENTS[name](folder_pair(), tmp_path / "laws", sample=LabSample(parameters=changes))
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("name", "changes", "fact"),
    [
        ("capacity", {"presets": ["slm-only", "llm-only"], "agents": [2, 1, 2]}, "- agents: 1, 2\n"),
        ("pareto", {"presets": ["colocated"]}, "s under `colocated`. All of these"),
        ("fedhlm", {"alphas": [1.0], "clients": 1, "clusters": 1}, "- seeds: 2\n"),
        ("u-hlm", {"taus": [0.5]}, "- seeds: 2\n"),
    ],
)
def test_whatever_presets_sizes_and_thresholds_run_the_report_is_whole(
    name: str, changes: dict[str, Any], fact: str, few: None, tmp_path: Path
) -> None:
    result = catalogue.EXPERIMENTS[name](folder_pair(), tmp_path / "laws", sample=LabSample(parameters=changes))
    text = markdown(result)
    assert "nan" not in text.lower()
    assert fact in text
    assert all(f"- {key}: " in text for key in ("SLM", "LLM"))


def test_parameters_are_for_one_experiment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("seeds = 2\n")
    assert main(["lab", "all", "--parameters", str(tmp_path / "mine.toml")]) == 2
    assert "--parameters must be given to one experiment" in capsys.readouterr().err


def test_times_that_are_given_are_not_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedhlm_lab.papers.pair.measured", lambda _decoder: ModelPace(0.5, 0.125))
    given = LabSample(parameters={"large_s": [0.5, 0.25]})
    experiment = ParetoExperiment.load("pareto", given)
    pair = folder_pair()._replace(own=True)
    found = paced(experiment, pair, given=given.parameters)
    assert found.large_s == (0.5, 0.25)
    assert found.device_s == found.beside_s == (0.5, 0.125)


def test_a_folder_that_cannot_be_written_is_one_line(
    few: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["lab", "u-hlm", "--cache", "file"]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_ag_news_is_used_where_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ag_news").mkdir()
    lines = [f'"{1 + i % 4}","Title {i}","Text {i}"' for i in range(9)]
    (tmp_path / "ag_news" / "test.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("FEDHLM_DATA", str(tmp_path))
    source = source_of(5)
    assert source.name == "AG News, test split"
    assert len(source.articles) == 5
    assert set(source.articles) < set(load_ag_news("test"))
