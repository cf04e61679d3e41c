"""The picture of the demo: one file that needs nothing else, of a run that took place."""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.text import Text

from fedhlm.config import load
from fedhlm_fleet.demo import picture
from fedhlm_fleet.demo.report import Generated, PresetRun, Report, figures

SHIPPED = Path(__file__).parents[3] / "docs" / "assets" / "demo.svg"
ROWS = ("kept on the device", "by the cloud", "uplink messages per token", "uplink bytes per token")


def texts_of(svg: str) -> str:
    """All that is written in an SVG, in reading order."""
    return " ".join("".join(ET.fromstring(svg).itertext()).replace("\xa0", " ").split())  # noqa: S314 - our own file


def loads_of(svg: str) -> list[str]:
    """What a reader's program would fetch from elsewhere."""
    return re.findall(r"""(?:url\(|href=|src=)["']?(?:https?:)?//[^"')]*""", svg)


def test_the_picture_holds_the_command_the_view_and_the_table_and_loads_nothing() -> None:
    generation = load(preset="hlm", environ={}).config.generation
    done = Generated(
        agent="a", task="topic", prompt="p", topic="World", seed=1, max_tokens=1, ids=[7], text=" World",
        sources=["cloud"], finish="length", statistics={"uplink_messages": 1.0, "uplink_bytes": 8_303.0},
    )  # fmt: skip
    measured = figures(PresetRun("hlm", generation, 1, [done], 1.0), {})
    report = Report(**{name: getattr(measured, name) for name in measured.__struct_fields__})
    drawn = picture.svg("fedhlm demo", Text("agent-1a writes <this>", style="green"), report, 0.95)
    words = texts_of(drawn)
    for expected in ("$ fedhlm demo", "agent-1a writes <this>", "by the cloud", "8,303.0", "settled without the cloud"):
        assert expected in words
    assert not loads_of(drawn)


def test_the_fonts_that_rich_would_load_are_what_is_left_out() -> None:
    from rich._export_format import CONSOLE_SVG_FORMAT

    assert loads_of(CONSOLE_SVG_FORMAT)


def test_the_shipped_picture_is_of_the_demo_as_it_is() -> None:
    svg = SHIPPED.read_text("utf-8")
    words = texts_of(svg)
    for expected in (
        "$ fedhlm demo",
        "agent-1a",
        "agent-2b",
        "threshold",
        "exact",
        "hlm",
        *ROWS,
        "settled without the cloud",
    ):
        assert expected in words
    assert not loads_of(svg)


@pytest.mark.slow
def test_a_run_is_drawn_while_all_agents_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo.svg"
    monkeypatch.setattr(sys, "argv", ["picture", str(out), "--duration", "3", "--preset", "exact"])
    picture.main()
    words = texts_of(out.read_text("utf-8"))
    assert "all agents write for 3 s under preset exact" in words
    for expected in ("agent-1a", "agent-2b", *ROWS[1:]):
        assert expected in words
