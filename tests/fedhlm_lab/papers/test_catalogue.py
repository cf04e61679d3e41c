"""The experiments from their files to their results, with the shipped pair on few shipped items, and their commands."""

from pathlib import Path
from typing import Any

import pytest

from fedhlm.errors import ConfigError
from fedhlm_fleet.cli import main
from fedhlm_lab.papers import catalogue
from fedhlm_lab.papers.experiment import Experiment, FedhlmExperiment, ParetoExperiment, UhlmExperiment
from fedhlm_lab.papers.requests import source_of
from fedhlm_lab.sim import verifier_costs
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

    def smaller(cls: type[Experiment], name: str, *, quick: bool = False) -> Any:
        shipped = load(cls, name, quick=quick)
        fields = {field: getattr(shipped, field) for field in shipped.__struct_fields__}
        return cls.of({**fields, **FEW[name]}, name)

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
    whole, quick = kind.load(name), kind.load(name, quick=True)
    assert quick.articles < whole.articles
    assert quick.paper == whole.paper
    assert all(value.tolerance > 0.0 for value in whole.paper)


def test_an_impossible_experiment_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"test must be an experiment"):
        FedhlmExperiment.of({"title": "x", "articles": 0}, "test")


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
