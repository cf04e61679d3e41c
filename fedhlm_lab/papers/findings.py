"""What an experiment finds: tables, charts, and values beside those of a paper."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedhlm_lab.papers.experiment import PaperValue
from fedhlm_lab.papers.intervals import SeedMean

Cell = str | float | int | SeedMean | None


class LabTable(NamedTuple):
    """A table: the name of its files, a heading, columns, and rows as long as the columns."""

    slug: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


class ChartSeries(NamedTuple):
    """One line, bar or cloud of points of a chart.

    `halves` are half intervals in x and y, the same for all points. `band` has half intervals in y point by point.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float]
    halves: tuple[float, float] = (0.0, 0.0)
    band: Sequence[float] = ()


class LabChart(NamedTuple):
    """A chart. `kind` is line, points, bars (side by side) or stack; `levels` are lines across it.

    Without `y_range` the y axis shows everything.
    """

    slug: str
    title: str
    x: str
    y: str
    kind: str
    series: Sequence[ChartSeries]
    levels: Mapping[str, float] = {}
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None


class LabPanels(NamedTuple):
    """Charts side by side with one legend; each has the same series."""

    slug: str
    title: str
    panels: Sequence[LabChart]


class PaperRow(NamedTuple):
    """A value of a paper beside ours under the published rules and under the calibrated ones (None: not applicable)."""

    paper: PaperValue
    published: float | SeedMean | None
    calibrated: float | SeedMean | None = None


class LabResult(NamedTuple):
    """All that an experiment found. `facts` say what it was made from, and `sentences` what it means."""

    slug: str
    title: str
    facts: Mapping[str, Any]
    sentences: Sequence[str]
    compared: Sequence[PaperRow]
    tables: Sequence[LabTable]
    charts: Sequence[LabChart | LabPanels]
