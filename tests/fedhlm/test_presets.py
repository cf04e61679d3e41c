"""Presets decide the whole mode, and which of them a prompt may name."""

from pathlib import Path
from typing import Any

import pytest

from fedhlm import choices, config
from fedhlm.config import load
from fedhlm.errors import ConfigError
from tests.fedhlm.configurations import MODES, error_of


def test_the_shipped_presets_are_the_documented_ones() -> None:
    assert set(config.presets()) == set(MODES)
    assert all(promise and "\n" not in promise for promise in config.presets().values())


@pytest.mark.parametrize(("name", "mode"), MODES.items())
def test_a_preset_decides_the_whole_mode(name: str, mode: tuple[str, str, str]) -> None:
    loaded = load(preset=name, environ={})
    generation = loaded.config.generation
    assert (generation.coupling, generation.gate, generation.pipeline.kind) == mode
    for choice in ("coupling", "gate", "peers", "threshold", "pipeline.kind", "pipeline.window", "pipeline.block"):
        assert loaded.sources[f"generation.{choice}"] == f"preset {name}"


def test_hlm_waits_for_every_token() -> None:
    assert load(preset="hlm", environ={}).config.generation.pipeline.block == 1


def test_a_preset_can_be_a_path(written: Any) -> None:
    path = written('promise = "mine"\n[generation]\ngate = "never"\n', "mine.toml")
    loaded = load(preset=str(path), environ={})
    assert loaded.config.generation.gate == "never"
    assert loaded.sources["generation.gate"] == f"preset {path}"


@pytest.mark.parametrize(
    ("text", "key", "expectation"),
    [
        ('[generation]\ngate = "never"\n', "promise", "one line of text"),
        ("promise = 3\n", "promise", "one line of text"),
        ('promise = "x"\n[broker]\nurl = "mqtt://elsewhere"\n', "broker.url", "a preset sets generation keys only"),
        ('promise = "x"\n[generation]\ngate = "no"\n', "generation.gate", "one of always, never, random, threshold"),
        ('promise = "x"\n[generation]\ngat = "no"\n', "generation.gat", "did you mean generation.gate?"),
    ],
)
def test_a_bad_preset_file_is_refused(text: str, key: str, expectation: str, written: Any) -> None:
    error = error_of(preset=str(written(text)))
    assert error.key == key
    assert expectation in error.expectation


def test_exchanging_the_preset_keeps_what_was_set_explicitly() -> None:
    loaded = load(environ={"FEDHLM_GENERATION__SEED": "9"}, flags={"generation.pipeline.block": "2"})
    changed = loaded.with_preset("hlm")
    assert (changed.config.preset, changed.config.generation.coupling) == ("hlm", "full")
    assert changed.config.generation.seed == 9
    assert changed.config.generation.pipeline.block == 2
    assert changed.sources["generation.coupling"] == "preset hlm"
    assert loaded.config.generation.coupling == "gumbel"


def test_exchanging_the_preset_takes_no_path(written: Any) -> None:
    path = written('promise = "x"\n')
    with pytest.raises(ConfigError, match="preset must be ") as refused:
        load(environ={}).with_preset(str(path))
    assert "or a path" not in refused.value.expectation


NEVER_UP = ("slm-only",)
TO_THE_CLOUD = ("colocated", "cu-hlm", "exact", "hlm", "llm-only", "rand-hlm", "speculative", "u-hlm")


@pytest.mark.parametrize(
    ("preset", "flags", "allowed"),
    [
        ("slm-only", {}, NEVER_UP),
        *((name, {}, NEVER_UP + TO_THE_CLOUD) for name in TO_THE_CLOUD),
        *((name, {}, tuple(config.presets())) for name in ("budget", "fedhlm")),
        ("slm-only", {"agent.presets": "exact,hlm"}, ("slm-only", "exact", "hlm")),
        ("budget", {"agent.presets": "slm-only"}, ("budget", "slm-only")),
    ],
)
def test_prompts_may_name_what_lets_the_text_go_no_farther(
    preset: str, flags: dict[str, str], allowed: tuple[str, ...]
) -> None:
    loaded = load(preset=preset, environ={}, flags=flags)
    assert set(loaded.allowed) == set(allowed)
    assert loaded.asked(None) is loaded
    for name in config.presets():
        if name in allowed:
            assert loaded.asked(name).config.preset == name
        else:
            with pytest.raises(ConfigError, match=f"allows: {', '.join(loaded.allowed)} .got '{name}'"):
                loaded.asked(name)


def test_flags_count_in_how_far_a_text_goes() -> None:
    opened = load(preset="slm-only", environ={}, flags={"generation.pipeline.kind": "remote"})
    assert set(opened.allowed) == {*NEVER_UP, *TO_THE_CLOUD}
    kept = load(preset="exact", environ={}, flags={"generation.gate": "never"})
    assert kept.asked("hlm").config.generation.gate == "never"
    assert "llm-only" not in kept.allowed


def test_the_page_on_security_has_the_same_rows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    for names, last in (
        (NEVER_UP, "`slm-only`"),
        (TO_THE_CLOUD, "these and `slm-only`"),
        (("budget", "fedhlm"), "all"),
    ):
        generation = load(preset=names[0], environ={}).config.generation
        who = choices.REACHES[choices.reach(generation.gate, generation.peers, generation.pipeline.kind)]
        assert f"| {', '.join(f'`{n}`' for n in names)} | {who} | {last} |" in page


def test_a_list_of_presets_that_do_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="agent.presets must be a list of budget, .*got 'exakt' from flag"):
        load(environ={}, flags={"agent.presets": "exact,exakt"})
