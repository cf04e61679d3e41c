"""Draws charts as PNG and SVG with matplotlib (the extra `lab`), without a display and without global state."""

import io
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedhlm_lab.papers.findings import LabChart

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


def drawn(chart: LabChart) -> dict[str, bytes]:
    """The chart as files: their endings and contents. Equal charts give equal bytes."""
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.add_subplot()
        _KINDS[chart.kind](axes, chart)
        for number, (name, level) in enumerate(chart.levels.items()):
            axes.axhline(level, linestyle=(0, (4, 1 + number)), linewidth=1.0, color="0.4")
            axes.annotate(name, (1.0, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
        axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
        if chart.log_x:
            axes.set_xscale("log")
        if chart.log_y:
            axes.set_yscale("log")
        if len(chart.series) > 1:
            figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        files = {}
        for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=110, metadata=facts)
            files[kind] = out.getvalue()
        return files


def _line(axes: Any, chart: LabChart) -> None:
    for number, series in enumerate(chart.series):
        axes.plot(series.x, series.y, marker=MARKS[number % len(MARKS)], markersize=3.5, label=series.name)


def _points(axes: Any, chart: LabChart) -> None:
    for number, series in enumerate(chart.series):
        axes.scatter(series.x, series.y, marker=MARKS[number % len(MARKS)], s=16, alpha=0.7, label=series.name)


def _bars(axes: Any, chart: LabChart) -> None:
    places = np.arange(len(chart.series[0].x))
    width = 0.8 / len(chart.series)
    for number, series in enumerate(chart.series):
        axes.bar(places + (number - (len(chart.series) - 1) / 2) * width, series.y, width, label=series.name)
    axes.set_xticks(places, chart.series[0].x)


def _stack(axes: Any, chart: LabChart) -> None:
    places, below = np.arange(len(chart.series[0].x)), np.zeros(len(chart.series[0].x))
    for series in chart.series:
        axes.bar(places, series.y, 0.6, bottom=below, label=series.name)
        below = below + np.asarray(series.y)
    axes.set_xticks(places, chart.series[0].x)


_KINDS: Final = {"line": _line, "points": _points, "bars": _bars, "stack": _stack}
