"""Draws charts as PNG and SVG with matplotlib (the extra `lab`), without a display and without global state."""

import io
from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedhlm_lab.papers.findings import ChartSeries, LabChart, LabPanels

LOOK: Final[Any] = {  # matplotlib's type names every parameter
    "svg.hashsalt": "fedhlm",
    "svg.fonttype": "none",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
MARKS: Final = "os^Dv<>P"
COLUMNS: Final = 3  # of panels, at most
TICKS: Final = 6  # values of a logarithmic axis that are all written at it
MANY: Final = 5  # bars whose names need room
COLOURS: Final = 10  # of matplotlib's cycle


def drawn(chart: LabChart | LabPanels) -> dict[str, bytes]:
    """The chart as files: their endings and contents. Equal charts give equal bytes."""
    with mpl.rc_context(LOOK):
        panels = chart.panels if isinstance(chart, LabPanels) else [chart]
        columns = min(COLUMNS, len(panels))
        rows = -(-len(panels) // columns)
        size = (6.4, 4.2) if len(panels) == 1 else (3.6 * columns, 3.0 * rows + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        for number, panel in enumerate(panels, start=1):
            axes: Any = figure.add_subplot() if len(panels) == 1 else figure.add_subplot(rows, columns, number)
            _draw(axes, panel)
        if isinstance(chart, LabPanels):
            figure.suptitle(chart.title)
        if len(panels[0].series) > 1:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            ncols = 2 * columns if len(panels) > 1 else 3
            figure.legend(handles, labels, loc="outside lower center", ncols=ncols, fontsize=8, frameon=False)
        files = {}
        for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=110, metadata=facts)
            files[kind] = out.getvalue()
        return files


def _draw(axes: Any, chart: LabChart) -> None:
    _KINDS[chart.kind](axes, chart)
    for number, (name, level) in enumerate(chart.levels.items()):
        axes.axhline(level, linestyle=(0, (4, 1 + number)), linewidth=1.0, color="0.4")
        axes.annotate(name, (1.0, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    if chart.log_x:
        values = [x for series in chart.series for x in series.x]
        _logarithmic(axes.set_xscale, axes.set_xlim, values)
        if len(sizes := sorted({x for x in values if not isinstance(x, str)})) <= TICKS:
            axes.set_xticks(sizes, labels=[f"{x:g}" for x in sizes])
            axes.set_xticks([], minor=True)
    if chart.log_y:
        _logarithmic(axes.set_yscale, axes.set_ylim, [y for series in chart.series for y in series.y])
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)


def _logarithmic(scale: Callable[..., object], limit: Callable[..., object], values: Sequence[float | str]) -> None:
    """A logarithmic axis, on which 0 has a place where a value is 0."""
    positive = [value for value in values if not isinstance(value, str) and value > 0.0]
    if len(positive) == len(values):
        scale("log")
        return
    least = min(positive, default=1.0)
    scale("symlog", linthresh=least)
    limit(-0.3 * least)


def _line(axes: Any, chart: LabChart) -> None:
    for number, series in enumerate(chart.series):
        axes.plot(series.x, series.y, marker=MARKS[number % len(MARKS)], markersize=3.5, label=series.name)
        if any(series.band):
            y, half = np.asarray(series.y), np.asarray(series.band)
            axes.fill_between(series.x, y - half, y + half, alpha=0.25, linewidth=0.0)


def _points(axes: Any, chart: LabChart) -> None:
    for number, series in enumerate(chart.series):
        mark, colour = MARKS[number % len(MARKS)], f"C{number}" if number < COLOURS else "black"
        axes.scatter(series.x, series.y, marker=mark, color=colour, s=20, alpha=0.8, label=series.name)
        if any(series.halves):
            across, up = series.halves
            below = [
                [min(across, 0.95 * float(x)) for x in series.x],
                [across] * len(series.x),
            ]  # an axis may have no 0
            axes.errorbar(series.x, series.y, xerr=below, yerr=up, fmt="none", ecolor=colour, elinewidth=0.8)


def _error_bars(series: ChartSeries) -> dict[str, Any]:
    return {"yerr": series.band, "capsize": 3.0} if any(series.band) else {}


def _bars(axes: Any, chart: LabChart) -> None:
    places = np.arange(len(chart.series[0].x))
    width = 0.8 / len(chart.series)
    for number, series in enumerate(chart.series):
        shifted = places + (number - (len(chart.series) - 1) / 2) * width
        axes.bar(shifted, series.y, width, label=series.name, **_error_bars(series))
    crowded = len(places) > MANY
    axes.set_xticks(places, chart.series[0].x, rotation=30 if crowded else 0, ha="right" if crowded else "center")


def _stack(axes: Any, chart: LabChart) -> None:
    places, below = np.arange(len(chart.series[0].x)), np.zeros(len(chart.series[0].x))
    for series in chart.series:
        axes.bar(places, series.y, 0.6, bottom=below, label=series.name, **_error_bars(series))
        below = below + np.asarray(series.y)
    axes.set_xticks(places, chart.series[0].x)


_KINDS: Final = {"line": _line, "points": _points, "bars": _bars, "stack": _stack}
