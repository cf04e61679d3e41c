"""What `fedhlm models pair` says of a pair: figures, tables, and the configuration with its reasons."""

from collections.abc import Mapping
from typing import Final

import msgspec

from fedhlm_fleet.pair_files import models_toml, quoted
from fedhlm_fleet.proposal import PipelineChoice
from fedhlm_zoo.evaluate import Agreement

PRESETS: Final = ("exact", "budget", "colocated", "slm-only")
LINKS: Final = ("lan", "lte", "satellite")
PROPOSED_ON: Final = "lte"


class LinkSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """A preset on a link in the simulator: tokens a second, and the share of tokens that the LLM would have written.

    `settings` of `generation.pipeline` replace the preset's own; `shape` says in words what they make of its drafts.
    """

    preset: str
    link: str
    tokens_s: float
    agreed: float
    shape: str = ""
    settings: Mapping[str, str | int] = {}


class LinkShapes(msgspec.Struct, frozen=True, kw_only=True):
    """The best shapes of drafts on a link by the closed formulas, the fastest first."""

    link: str
    shapes: tuple[PipelineChoice, ...]


class PairReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a pair is and gives. Steps are seconds of one thread; `block_s` is that of the LLM for eight tokens.

    `preset` is proposed with the settings `pipeline` of `generation.pipeline`; where there are none, with its own.
    """

    slm: str
    llm: str
    projection: str
    agreement: Agreement
    draft_step_s: float
    step_s: float
    block_s: float
    speeds: tuple[LinkSpeed, ...]
    shapes: tuple[LinkShapes, ...]
    preset: str
    pipeline: Mapping[str, str | int]


def toml_of(report: PairReport) -> str:
    """The configuration of a fleet with the pair."""
    told = "Made by fedhlm models pair. It serves every part: fedhlm cloud|edge|agent --config pair.toml"
    lines = [*models_toml(report.slm, report.llm, report.preset, told=told), *reasons_of(report)]
    if report.pipeline:
        lines += ["[generation.pipeline]", *(f"{key} = {quoted(value)}" for key, value in report.pipeline.items())]
    return "\n".join([*lines, ""])


def reasons_of(report: PairReport) -> list[str]:
    """Why this preset and pipeline, as comments of a TOML file."""
    step, block = 1e3 * report.draft_step_s, 1e3 * report.block_s
    tried = [speed for speed in report.speeds if speed.link == PROPOSED_ON and speed.preset in _names(report)]
    kept = "has the fastest pipeline" if report.pipeline else "is the fastest with its own pipeline"
    return [
        f"# On {PROPOSED_ON} {report.preset} {kept}. A draft takes {step:.1f} ms, a block of eight {block:.1f} ms at the",
        f"# LLM, which accepts {report.agreement.gumbel:.0%} of drafts. Tokens a second in the simulator:",
        *(f"#   {_label(speed)}: {speed.tokens_s:.1f}" for speed in sorted(tried, key=lambda s: -s.tokens_s)),
        "# By formula the best drafts of exact are:",
        *(f"#   {of.link}: {of.shapes[0].shape}, {_written(of.shapes[0].settings)}" for of in report.shapes),
    ]


def table_of(report: PairReport) -> str:
    """What a pair gives, as text."""
    found = {(speed.preset, speed.link): speed for speed in report.speeds if not speed.settings}
    shown = [["tokens/s", *LINKS, "as the LLM's"]]
    for preset in PRESETS:
        of = [found[preset, link] for link in LINKS]
        shown.append([preset, *(f"{s.tokens_s:.1f}" for s in of), f"{sum(s.agreed for s in of) / len(of):.0%}"])
    for speed in report.speeds:
        if speed.settings:
            speeds = [f"{speed.tokens_s:.1f}" if link == speed.link else "" for link in LINKS]
            shown.append([_label(speed), *speeds, f"{speed.agreed:.0%}"])
    return aligned(shown)


def shapes_of(report: PairReport) -> str:
    """The best shapes of drafts on each link by the closed formulas, with their tokens a second, as text."""
    head = ["exact, by formula", "best", "tokens/s", "second", "tokens/s", "third", "tokens/s"]
    rows = (
        [of.link, *(cell for choice in of.shapes for cell in (choice.shape, f"{choice.tokens_s:.1f}"))]
        for of in report.shapes
    )
    return aligned([head, *rows])


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as columns: the first one to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _names(report: PairReport) -> set[str]:
    return {speed.preset for speed in report.speeds if speed.settings} | {report.preset}


def _label(speed: LinkSpeed) -> str:
    words = speed.shape or _written(speed.settings)
    return f"{speed.preset}, {words}" if words else speed.preset


def _written(settings: Mapping[str, str | int]) -> str:
    return " ".join(f"{key} {value}" for key, value in settings.items())
