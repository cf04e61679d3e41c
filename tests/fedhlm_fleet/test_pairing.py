"""Two models become the configuration of a fleet: compared, measured, simulated on links, and checked before that."""

import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhlm.config import load
from fedhlm.decoding.models import tokenizer_at
from fedhlm.errors import ConfigError, ModelError
from fedhlm.peers.context_keys import projection_file
from fedhlm_fleet import pairing
from fedhlm_fleet.commands.models import models_pair
from fedhlm_fleet.demo.run import Demo
from fedhlm_fleet.pair_files import PAIR_FILE, pair_file
from fedhlm_fleet.pair_report import LINKS, PRESETS, PairReport
from fedhlm_fleet.turns import speech_of
from fedhlm_zoo import pair
from fedhlm_zoo.sources import local_model
from tests.fedhlm.decoding.ggufs import metadata_of_shipped, tensors_of, tiny_gguf, write_gguf

FEW = pairing.Amounts(prompts=3, tokens=8, texts=1, warm=1)
LITTLE: dict[str, Any] = {"prompts": 3, "tokens": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small GGUF model, and another one that is near it."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: both models run on it")
    folder = tmp_path_factory.mktemp("models")
    metadata, rng = metadata_of_shipped(), np.random.default_rng(9)
    large = tensors_of(len(metadata["tokenizer.ggml.tokens"]))
    small = {
        name: value + 0.02 * rng.standard_normal(value.shape).astype(np.float32) if value.ndim > 1 else value
        for name, value in large.items()
    }
    return write_gguf(folder / "small.gguf", metadata, small), write_gguf(folder / "large.gguf", metadata, large)


@pytest.fixture(scope="module")
def made(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PairReport]:
    out = tmp_path_factory.mktemp("pair")
    return out, pairing.make_pair(*models, out, amounts=FEW)


def test_the_configuration_names_both_models_and_the_fastest_preset(
    made: tuple[Path, PairReport], models: tuple[Path, Path]
) -> None:
    out, report = made
    config = load(file=out / PAIR_FILE, environ={}).config
    assert (config.agent.model, config.cloud.model, config.cloud.draft_model) == (*map(str, models), str(models[0]))
    own = [(s.preset, s.link) for s in report.speeds if not s.settings]
    assert own == [(preset, link) for preset in PRESETS for link in LINKS]
    assert report.preset == tomllib.loads((out / PAIR_FILE).read_text())["preset"]
    tried = [s for s in report.speeds if s.link == "lte" and s.preset in pairing.PROPOSED]
    best = max(tried, key=lambda s: s.tokens_s)
    assert (report.preset, report.pipeline) == (best.preset, best.settings)
    assert {s.settings.get("kind") for s in tried if s.preset == "exact"} == {None, "blocking", "async", "tree"}
    for key, value in report.pipeline.items():
        assert getattr(config.generation.pipeline, key) == value


def test_the_simulator_spends_the_measured_times_on_the_links(made: tuple[Path, PairReport]) -> None:
    report = made[1]
    speed = {(s.preset, s.link): s for s in report.speeds if not s.settings}
    alone = [speed["slm-only", link] for link in LINKS]
    assert [s.tokens_s for s in alone] == pytest.approx([1 / report.draft_step_s] * 3, rel=0.05)  # no link is used
    for preset in ("exact", "colocated"):
        lan, lte, satellite = (speed[preset, link] for link in LINKS)
        assert lan.tokens_s > lte.tokens_s > satellite.tokens_s
        assert [lan.agreed, lte.agreed, satellite.agreed] == [1.0] * 3
    assert 0.2 < report.agreement.gumbel < 1.0


def test_a_second_call_keeps_what_was_measured(
    made: tuple[Path, PairReport], models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = made
    assert projection_file(models[0]).is_file()
    assert report.projection == "fitted on 64 texts"

    def again(*_given: object, **_named: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(pair, "agreement_after", again)
    second = pairing.make_pair(*models, out, amounts=FEW)
    assert second.agreement == report.agreement
    assert second.projection == "was there"


def test_the_command_prints_what_the_pair_gives(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert models_pair(*map(str, models), out=tmp_path / "pair", **LITTLE) == 0
    printed = capsys.readouterr().out
    assert f"fedhlm demo --pair {tmp_path / 'pair'}" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    assert rows["tokens/s"][:3] == ["lan", "lte", "satellite"]
    assert rows["exact"][-1] == "100%"
    assert set(PRESETS) <= rows.keys()
    assert "exact, by formula" in printed


def test_a_demo_runs_its_parts_on_a_pair(made: tuple[Path, PairReport], models: tuple[Path, Path]) -> None:
    demo = Demo(preset="exact", prompts=None, tokens=4, seed=0, broker="", duration_s=1.0, pair=pair_file(str(made[0])))
    small, large = map(str, models)
    assert demo.models == {"agent.model": small, "cloud.model": large, "cloud.draft_model": small}
    assert (demo.slm, demo.llm) == models


def test_hugging_face_folders_are_exported_and_quantised(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="exports with torch")
    from fedhlm_zoo.tiny import make_tiny

    folders = [make_tiny("llama", tmp_path / f"source-{seed}", seed=seed) for seed in (3, 4)]
    out = tmp_path / "pair"
    report = pairing.make_pair(folders[0], folders[1], out, texts=["one two", "three four"], amounts=FEW)
    config = load(file=out / PAIR_FILE, environ={}).config
    assert (config.agent.model, config.cloud.model) == (str(out / "slm"), str(out / "llm"))
    assert (out / "slm" / "quantisation.json").is_file()
    assert report.projection == "none: the hidden size of 32 is below 64"
    assert sorted(path.name for path in out.iterdir()) == [
        "agreement.json",
        "llm",
        "models.json",
        "pair.json",
        PAIR_FILE,
        "slm",
    ]
    for others in (folders[::-1], [make_tiny("llama", folders[0], seed=5), folders[1]]):
        with pytest.raises(ConfigError, match="a new folder, or one begun with"):
            pairing.make_pair(others[0], others[1], out, texts=["one two", "three four"], amounts=FEW)


def test_bad_input_is_said_before_anything_is_measured(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    small, large = models
    for named in ("./missing.gguf", "missing", "~/no-such-folder"):
        with pytest.raises(ModelError, match=r"must be a folder, a GGUF file, a hub id or one of smollm2"):
            local_model(named)
    (text := tmp_path / "notes.gguf").write_text("no model")
    with pytest.raises(ModelError, match="must be a GGUF file"):
        pairing.make_pair(text, large, tmp_path / "out")
    texts = ["<|endoftext|>", *map(chr, range(0x100, 0x2FF))]
    kinds = [3] + [1] * (len(texts) - 1)
    tokens = {"tokenizer__ggml__tokens": texts, "tokenizer__ggml__token_type": kinds, "tokenizer__ggml__merges": []}
    other = tiny_gguf(tmp_path / "other.gguf", **tokens)
    with pytest.raises(ModelError, match="must have the tokenizer of"):
        pairing.make_pair(other, large, tmp_path / "out")
    with pytest.raises(ConfigError, match="a folder, or the name of a new one"):
        pairing.make_pair(small, large, text)
    with pytest.raises(ConfigError, match="must be a folder made by 'fedhlm models pair'"):
        pair_file("nothing")


def test_a_full_disk_is_said_with_the_room_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "model").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(2_000_000))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1_000_000))
    with pytest.raises(ConfigError, match=r"a folder with 6 MB of free space.*it has 1 MB"):
        pair.check_room(tmp_path / "out", folder)


def test_prompts_go_through_the_template_of_the_model(models: tuple[Path, Path]) -> None:
    large = models[1]
    speech = speech_of(large)
    assert speech.template is not None
    (ids,) = pairing.prompts_of(speech, large, ["A question\nand more"], 1)
    tokenizer = tokenizer_at(large)[0]
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<|endoftext|>user: A question")
    assert ids[0] == speech.turns.opening[0]
