"""The results of one experiment with several seeds as one: means with intervals, cell by cell and point by point."""

from collections.abc import Sequence
from typing import TypeVar

from fedhlm_lab.papers.findings import Cell, ChartSeries, LabChart, LabPanels, LabResult, LabTable, PaperRow
from fedhlm_lab.papers.intervals import SeedMean, mean_of

Part = TypeVar("Part")


def over_seeds(results: Sequence[LabResult]) -> LabResult:
    """The means of results that differ in their seed alone. Facts and sentences are those of the first.

    What is equal under all seeds stays as it is. A value that one of the seeds does not have is left out. A cloud of
    points has those of all seeds.

    Raises:
        ValueError: the results have different tables, rows or charts.
    """
    compared = [
        PaperRow(rows[0].paper, _value([r.published for r in rows]), _value([r.calibrated for r in rows]))
        for rows in zip(*(result.compared for result in results), strict=True)
    ]
    tables = [_table(tables) for tables in zip(*(result.tables for result in results), strict=True)]
    charts = [_chart(charts) for charts in zip(*(result.charts for result in results), strict=True)]
    return results[0]._replace(compared=compared, tables=tables, charts=charts)


def _same(parts: Sequence[Part]) -> Part:
    """What all seeds have.

    Raises:
        ValueError: they differ.
    """
    for part in parts:
        if part != parts[0]:
            raise ValueError(f"results of all seeds must have the same rows and charts (got {parts[0]!r} and {part!r})")
    return parts[0]


def _value(values: Sequence[float | SeedMean | None]) -> float | SeedMean | None:
    """The mean of a quantity; the quantity itself if it is always the same, and None if a seed has none."""
    known = [value for value in values if isinstance(value, float | int)]
    if len(known) < len(values):
        return None
    return known[0] if len(set(known)) == 1 else mean_of(known)


def _cell(cells: Sequence[Cell]) -> Cell:
    return _same(cells) if isinstance(cells[0], str) else _value([c for c in cells if not isinstance(c, str)])


def _table(tables: Sequence[LabTable]) -> LabTable:
    first = tables[0]
    rows = [
        [_cell(cells) for cells in zip(*rows, strict=True)]
        for rows in zip(*(table.rows for table in tables), strict=True)
    ]
    _same([(table.slug, table.title, *table.columns, table.note) for table in tables])
    return first._replace(rows=rows)


def _chart(charts: Sequence[LabChart | LabPanels]) -> LabChart | LabPanels:
    alone = [chart for chart in charts if isinstance(chart, LabChart)]
    if len(alone) < len(charts):
        raise ValueError("results of several seeds must have charts without panels")
    first = alone[0]
    joined = _pooled if first.kind == "points" else _mean
    series = [joined(lines) for lines in zip(*(chart.series for chart in alone), strict=True)]
    names = _same([tuple(chart.levels) for chart in alone])
    levels = {name: sum(chart.levels[name] for chart in alone) / len(alone) for name in names}
    return first._replace(series=series, levels=levels)


def _pooled(clouds: Sequence[ChartSeries]) -> ChartSeries:
    name = _same([cloud.name for cloud in clouds])
    return ChartSeries(name, [x for cloud in clouds for x in cloud.x], [y for cloud in clouds for y in cloud.y])


def _mean(lines: Sequence[ChartSeries]) -> ChartSeries:
    """The mean line, at the places that the lines of all seeds have."""
    name = _same([line.name for line in lines])
    known = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    x = [place for place in lines[0].x if all(place in points for points in known)]
    means = [mean_of([points[place] for points in known]) for place in x]
    return ChartSeries(name, x, [m.mean for m in means], band=[m.half for m in means])
