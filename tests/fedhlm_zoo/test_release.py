"""A release is two model folders that load, with figures and cards that say what was measured."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedhlm.decoding.decoder import Decoder, load_info
from fedhlm.errors import ModelError
from fedhlm_zoo.corpus import TOPICS
from fedhlm_zoo.prompts import load_items

pytest.importorskip("torch", reason="makes its models with torch")
pytest.importorskip("optimum.exporters.onnx", reason="exports its models with optimum")

from fedhlm_zoo.release import FIGURES_FILE, release

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with (folder / "test.csv").open("w", newline="") as file:
        short = [a for a in load_items() if len(a.body) < 170][:6]
        csv.writer(file).writerows([TOPICS.index(a.topic) + 1, a.title, a.text] for a in short)
    return folder


def test_a_release_loads_and_tells_its_figures(
    news_model: Callable[[int], Path], news_tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    for seed, name in ((1, "llm"), (2, "slm")):
        shutil.copytree(news_model(seed), runs / name / "model")
    shutil.copytree(news_tokenizer, runs / "tok")
    made = release(runs, out, data, prompts=2)
    assert set(made) == {"llm", "slm"}
    for name, mode in (("llm", "weights-int8"), ("slm", "int8-dynamic")):
        assert (load_info(out / name).quantisation, load_info(out / name).bos_id) == (mode, 0)
        assert Decoder.load(out / name).info.name == f"fedhlm-news-{name}"
        figures = json.loads((out / name / FIGURES_FILE).read_bytes())
        assert [f["label"] for f in figures] == ["fp32", mode]
        assert figures[1]["graph_bytes"] < figures[0]["graph_bytes"]
        assert (figures[1]["agreement"] is None) == (name == "llm")
        card = (out / name / "README.md").read_text()
        assert f"{figures[1]['evaluation']['perplexity']:.2f}" in card
        assert "| llm-news |" in card or name == "slm"


def test_an_unfinished_run_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="llm/model is missing"):
        release(tmp_path, tmp_path / "out", data)
