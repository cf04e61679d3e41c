"""A result of the lab: tables, charts and sentences, written as Markdown, CSV, PNG and SVG with what they were made by."""

import csv
import importlib.metadata
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from fedhlm.errors import FedhlmError
from fedhlm.process.files import replace_file
from fedhlm.version import __version__
from fedhlm_lab.papers.experiment import PaperValue
from fedhlm_lab.papers.findings import Cell, LabChart, LabPanels, LabResult, LabTable, PaperRow
from fedhlm_lab.papers.intervals import SeedMean

LIBRARIES: Final = ("numpy", "onnxruntime", "tokenizers", "msgspec", "matplotlib")


def environment(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a result was made by: versions, processor, and the experiment's own facts. No time, so results compare."""
    known: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            known[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            known[library] = "absent"
    return {
        "fedhlm": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "libraries": known,
        **facts,
    }


def compared_table(rows: Sequence[PaperRow]) -> LabTable:
    """The papers' values beside ours, with what speaks against them."""
    lines: list[Sequence[Cell]] = []
    for row in rows:
        met = "-" if row.published is None else verdict(row.paper, row.published)
        lines.append(
            (row.paper.place, row.paper.name, row.paper.value, row.published, met, row.calibrated, row.paper.why_not)
        )
    columns = ("in the paper", "quantity", "paper", "published rules", "within tolerance", "calibrated rules", "remark")
    return LabTable("paper", "Beside the paper", columns, lines)


def verdict(paper: PaperValue, ours: float | SeedMean) -> str:
    """Whether our value is within the paper's tolerance: yes, no, or open where only a part of its interval is."""
    mean, half = ours if isinstance(ours, SeedMean) else (ours, 0.0)
    if paper.met(mean - half) and paper.met(mean + half):
        return "yes"
    return "open" if abs(mean - paper.value) <= paper.tolerance + half else "no"


def shown(cell: Cell) -> str:
    """A cell as text."""
    if cell is None:
        return "-"
    if isinstance(cell, SeedMean):
        return cell.full
    return f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell


def markdown(result: LabResult) -> str:
    """The report as Markdown; it shows the PNG files beside it."""
    lines = [f"# {result.title}", ""]
    for key, value in result.facts.items():
        lines.append(f"- {key}: {value}")
    lines += ["", *(f"{sentence}\n" for sentence in result.sentences)]
    for table in (compared_table(result.compared), *result.tables) if result.compared else result.tables:
        lines += [f"## {table.title}", "", f"| {' | '.join(table.columns)} |", "|" + "---|" * len(table.columns)]
        lines += [f"| {' | '.join(map(shown, row))} |" for row in table.rows]
        lines += ["", *([table.note, ""] if table.note else [])]
    for chart in result.charts:
        lines += [f"## {chart.title}", "", f"![{chart.title}]({chart.slug}.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def csv_of(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Rows as CSV, numbers in full. A column with means over seeds has one with the halves of their intervals behind it."""
    means = [any(isinstance(row[place], SeedMean) for row in rows) for place in range(len(columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(n for name, mean in zip(columns, means, strict=True) for n in (name, f"half of {name}")[: 1 + mean])
    writer.writerows([c for cell, mean in zip(row, means, strict=True) for c in _fields(cell, mean)] for row in rows)
    return out.getvalue()


def _fields(cell: Cell, mean: bool) -> list[str | float | int]:
    """The fields of a cell, in a column with means over seeds or in another one."""
    if isinstance(cell, SeedMean):
        return [cell.mean, cell.half]
    return ["" if cell is None else cell, *([""] if mean else [])]


def _points(chart: LabChart | LabPanels) -> str:
    """The points of a chart as CSV; those of panels with the names of the panels and with half intervals."""
    if isinstance(chart, LabChart):
        rows = [
            (series.name, x, SeedMean(y, half) if series.band else y)
            for series in chart.series
            for x, y, half in zip(series.x, series.y, series.band or [0.0] * len(series.y), strict=True)
        ]
        return csv_of(("series", chart.x, chart.y), rows)
    points = [
        (panel.slug, series.name, panel.x, x, series.halves[0], panel.y, y, half)
        for panel in chart.panels
        for series in panel.series
        for x, y, half in zip(series.x, series.y, series.band or [series.halves[1]] * len(series.y), strict=True)
    ]
    return csv_of(("panel", "series", "quantity x", "x", "half of x", "quantity y", "y", "half of y"), points)


def write(result: LabResult, folder: Path) -> list[Path]:
    """Write a result: report.md, environment.json, a CSV file for each table and chart, and PNG and SVG of each chart.

    Raises:
        FedhlmError: the folder cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from fedhlm_lab.papers.charts import drawn

    files: dict[str, bytes] = {
        "report.md": markdown(result).encode(),
        "environment.json": msgspec.json.format(msgspec.json.encode(environment(result.facts)), indent=2) + b"\n",
    }
    for table in (compared_table(result.compared), *result.tables) if result.compared else result.tables:
        files[f"{table.slug}.csv"] = csv_of(table.columns, table.rows).encode()
    for chart in result.charts:
        files[f"{chart.slug}.csv"] = _points(chart).encode()
        for kind, data in drawn(chart).items():
            files[f"{chart.slug}.{kind}"] = data
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            replace_file(folder / name, data)
    except OSError as exc:
        raise FedhlmError(f"the folder of results {str(folder)!r} cannot be written: {exc.strerror or exc}") from exc
    return [folder / name for name in files]
