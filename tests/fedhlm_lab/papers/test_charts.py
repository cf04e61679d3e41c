"""Charts as a reader sees them: what is written at their axes."""

import re

from fedhlm_lab.papers.charts import drawn
from fedhlm_lab.papers.findings import ChartSeries, LabChart


def written_at(sizes: list[float]) -> set[str]:
    chart = LabChart("c", "C", "agents", "tokens/s", "line", [ChartSeries("exact", sizes, sizes)], log_x=True)
    return set(re.findall(r">([^<>]+)</text>", drawn(chart)["svg"].decode()))


def test_few_values_of_a_logarithmic_axis_are_all_written_as_they_are() -> None:
    assert written_at([4, 16, 32, 48]) >= {"4", "16", "32", "48"}
    assert not any("×" in words or "^" in words for words in written_at([4, 16, 32, 48]))


def test_many_values_have_powers_of_ten() -> None:
    assert "48" not in written_at([4, 8, 16, 24, 32, 40, 48, 100])
