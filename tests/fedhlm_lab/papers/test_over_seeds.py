"""Results of several seeds as one: means with intervals in tables, comparisons, charts and files."""

import csv
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_lab.papers.experiment import PaperValue
from fedhlm_lab.papers.findings import Cell, ChartSeries, LabChart, LabResult, LabTable, PaperRow
from fedhlm_lab.papers.intervals import SeedMean, mean_of, student
from fedhlm_lab.papers.over_seeds import over_seeds
from fedhlm_lab.papers.report import compared_table, csv_of, markdown, verdict

PAPER = PaperValue("Table I", "share", 0.5, 0.1)
VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


def result(
    *cells: Cell, ours: float | None = 0.5, line: Sequence[tuple[float, float]] = ((0.0, 0.0),), kind: str = "line"
) -> LabResult:
    series = ChartSeries("line", [x for x, _ in line], [y for _, y in line])
    chart = LabChart("chart", "A chart", "x", "y", kind, [series], {"level": line[0][1]})
    table = LabTable("table", "A table", [str(number) for number in range(len(cells))], [cells])
    return LabResult("result", "A result", {}, [], [PaperRow(PAPER, ours)], [table], [chart])


def test_intervals_are_those_of_students_t() -> None:
    assert student(4) == pytest.approx(2.776, abs=1e-3)
    assert student(1) == pytest.approx(12.706, abs=1e-2)
    assert student(4, 0.5) == pytest.approx(0.741, abs=1e-3)
    known = mean_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert known.mean == 3.0
    assert known.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), abs=1e-3)
    assert str(mean_of([1.0, 1.0])) == "1"


@given(VALUES)
def test_each_number_of_a_result_is_its_mean_over_the_seeds(values: list[float]) -> None:
    joined = over_seeds([result("name", v, 7, ours=v, line=[(1.0, v), (2.0, -v)]) for v in values])
    ((name, cell, constant),) = joined.tables[0].rows
    expected = values[0] if len(set(values)) == 1 else mean_of(values)
    assert (name, cell, constant) == ("name", expected, 7)
    assert joined.compared[0].published == expected
    (chart,) = joined.charts
    assert isinstance(chart, LabChart)
    (line,) = chart.series
    assert list(line.x) == [1.0, 2.0]
    assert list(line.y) == pytest.approx([mean_of(values).mean, -mean_of(values).mean])
    assert list(line.band) == pytest.approx([mean_of(values).half] * 2)
    assert chart.levels["level"] == pytest.approx(mean_of(values).mean)


def test_what_a_seed_does_not_have_is_left_out() -> None:
    joined = over_seeds(
        [
            result("name", None, ours=None, line=[(1.0, 1.0), (2.0, 2.0)]),
            result("name", 3.0, ours=0.5, line=[(1.0, 3.0), (4.0, 2.0)]),
        ]
    )
    assert joined.tables[0].rows == [["name", None]]
    assert joined.compared[0].published is None
    (chart,) = joined.charts
    assert isinstance(chart, LabChart)
    assert (list(chart.series[0].x), list(chart.series[0].y)) == ([1.0], [2.0])


def test_clouds_of_points_are_put_together() -> None:
    joined = over_seeds([result(line=[(x, 2.0 * x)], kind="points") for x in (3.0, 1.0, 2.0)])
    (chart,) = joined.charts
    assert isinstance(chart, LabChart)
    assert (list(chart.series[0].x), list(chart.series[0].y)) == ([3.0, 1.0, 2.0], [6.0, 2.0, 4.0])


def test_results_of_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"results of all seeds must have the same rows and charts"):
        over_seeds([result("one", 1.0), result("other", 1.0)])


@given(mean=st.floats(0.0, 1.0), half=st.floats(0.0, 0.5))
def test_a_value_is_within_the_tolerance_only_with_its_whole_interval(mean: float, half: float) -> None:
    said = verdict(PAPER, SeedMean(mean, half))
    inside = [PAPER.met(mean + share * half) for share in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    if said == "yes":
        assert all(inside)
    elif said == "no":
        assert not any(inside)
    else:
        assert not all(inside)
    assert verdict(PAPER, SeedMean(mean, 0.0)) == verdict(PAPER, mean) != "open"


def test_reports_and_files_have_the_intervals() -> None:
    joined = over_seeds([result("name", v, ours=v, line=[(1.0, v)]) for v in (0.4, 0.6)])
    half = mean_of([0.4, 0.6]).half
    assert f"| name | 0.5 ± {half:.2g} |" in markdown(joined)
    (row,) = compared_table(joined.compared).rows
    assert row[4] == "open"
    table = joined.tables[0]
    header, fields = csv.reader(csv_of(table.columns, table.rows).splitlines())
    assert header == ["0", "1", "half of 1"]
    assert fields == ["name", str(mean_of([0.4, 0.6]).mean), str(half)]
    assert (
        csv_of(("a", "b"), [("x", SeedMean(1.0, 2.0)), ("y", None), ("z", 3)])
        == "a,b,half of b\nx,1.0,2.0\ny,,\nz,3,\n"
    )


@pytest.mark.parametrize(
    ("known", "full", "percent"),
    [
        (SeedMean(0.88471, 0.00031), "0.8847 ± 0.00031", "88.47 ± 0.031 %"),
        (SeedMean(12_571.4, 123.4), "12,571 ± 123", "1.257e+06 ± 1.2e+04 %"),
        (SeedMean(0.9057, 0.0), "0.9057", "90.57 %"),
    ],
)
def test_means_are_written_with_as_many_digits_as_other_numbers(known: SeedMean, full: str, percent: str) -> None:
    assert known.full == full
    assert known.percent == percent
