"""Settings are documented in one place: every key says what it does, and the command, the page and the checks say the same."""

import re
from pathlib import Path

import pytest

from fedhlm.config import DESCRIPTIONS, KEYS, SECTIONS, default, environment_name, expectation, load, presets
from fedhlm.errors import ConfigError, UnknownKey
from fedhlm.explain import explain, mentioned, related, tables
from fedhlm.marks import rewrite, rewritten

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def told(name: str = "", **flags: str) -> str:
    return explain(load(environ={}, flags={key.replace("__", "."): value for key, value in flags.items()}), name)


@pytest.mark.parametrize("key", [*KEYS, *SECTIONS])
def test_every_key_and_section_says_what_it_is_in_a_sentence(key: str) -> None:
    text = DESCRIPTIONS[key]
    assert re.fullmatch(r"[A-Za-z].{10,}\.", text), f"{key}: {text!r}"
    assert "\n" not in text


@pytest.mark.parametrize("key", [key for key in KEYS if re.search(r"_(s|ms|bytes|tokens)$", key)])
def test_a_unit_in_a_name_is_a_word_of_the_description(key: str) -> None:
    unit = {"s": "second", "ms": "millisecond", "bytes": "bytes", "tokens": "token"}[key.rpartition("_")[2]]
    assert unit in DESCRIPTIONS[key].lower(), DESCRIPTIONS[key]


@pytest.mark.parametrize("key", KEYS)
def test_every_word_in_backticks_is_a_key(key: str) -> None:
    assert set(mentioned(key)) <= {*KEYS, *SECTIONS}
    assert key not in related(key)


def test_relations_hold_both_ways() -> None:
    for key in KEYS:
        for other in related(key):
            assert key in related(other)
    assert "generation.budget" in related("generation.consensus.error_share")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_explained_with_limits_default_value_and_the_ways_to_set_it(key: str) -> None:
    text = told(key)
    first, *facts = text.splitlines()
    assert first == f"{key}: {DESCRIPTIONS[key].replace('`', '')}"
    assert f"  default   {default(key)}" in facts
    assert f"  must be   {expectation(key)}" in facts
    assert environment_name(key) in text


def test_the_value_now_and_its_source_are_told() -> None:
    assert "  value     0.02 (flag --generation.budget)" in told("generation.budget", generation__budget="0.02")
    assert '  value     "threshold" (preset budget)' in told("generation.gate")


def test_a_secret_is_neither_shown_nor_offered_as_a_flag() -> None:
    loaded = load(environ={"FEDHLM_BROKER__PASSWORD": "hunter2", "FEDHLM_BROKER__URL": "mqtt://me:hunter2@host"})
    for key in ("broker.password", "broker.url"):
        text = explain(loaded, key)
        assert "hunter2" not in text
        assert '"***" (env FEDHLM_BROKER__' in text
    assert "--broker.password" not in explain(loaded, "broker.password")


@pytest.mark.parametrize("name", ["--generation.pipeline.flush-age-ms", "FEDHLM_GENERATION__PIPELINE__FLUSH_AGE_MS"])
def test_a_key_is_known_as_a_flag_and_as_a_variable_too(name: str) -> None:
    assert told(name) == told("generation.pipeline.flush_age_ms")


def test_a_section_lists_its_keys_and_sections_and_nothing_else() -> None:
    text = told("generation")
    for key in KEYS:
        assert (re.search(rf"^  {re.escape(key)} ", text, re.MULTILINE) is not None) == key.startswith("generation.")
    assert len(re.findall(r"^  edge\.upstream\.url ", told("edge"), re.MULTILINE)) == 1


def test_without_a_name_every_key_is_listed() -> None:
    text = told()
    for key in KEYS:
        assert re.search(rf"^  {re.escape(key)} ", text, re.MULTILINE), key


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_explained_by_its_promise_and_what_it_sets(name: str) -> None:
    first, *rows = told(name).splitlines()
    assert first == f"preset {name}: {presets()[name]}"
    set_by_it = {key for key, source in load(preset=name, environ={}).sources.items() if source == f"preset {name}"}
    assert {row.split()[0] for row in rows} == set_by_it


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("generation.budgt", "generation.budget"),
        ("genration", "generation"),
        ("broker.urls", "broker.url"),
        ("u-hml", "u-hlm"),
    ],
)
def test_a_typo_gets_the_nearest_name(typed: str, meant: str) -> None:
    with pytest.raises(UnknownKey) as caught:
        told(typed)
    assert str(caught.value) == f"{typed} is not a known key: did you mean {meant}?"
    assert isinstance(caught.value, ConfigError)


# The page


def test_the_page_is_what_the_settings_say() -> None:
    page = PAGE.read_text("utf-8")
    assert rewritten(page, tables()) == page, "python -m fedhlm.explain docs/configuration.md"
    for name, text in tables().items():
        assert f"<!-- {name} -->\n\n{text}\n\n<!-- end of {name} -->" in page


def test_a_page_that_says_something_else_is_noticed_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    whole = PAGE.read_text("utf-8")
    page.write_text(whole.replace("| `0.05` |", "| `0.06` |"), "utf-8")
    assert rewritten(page.read_text("utf-8"), tables()) != page.read_text("utf-8")
    rewrite([str(page)], tables())
    assert page.read_text("utf-8") == whole


def test_every_key_and_preset_has_a_row() -> None:
    rows = tables()
    for key in KEYS:
        if not key.startswith("edge.upstream."):
            section, _, name = key.rpartition(".")
            part = rows["settings"].partition(f"### `{section}`")[2] if section else rows["settings"]
            assert f"| `{name}` | " in part.partition("### ")[0], key
    for name in presets():
        assert f"| `{name}`" in rows["presets"]
