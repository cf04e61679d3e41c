"""No module imports itself by way of others: a reader can begin anywhere and come to an end."""

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")


def circle(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules each of which imports the one before it, the first and the last being the same; empty where there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as exc:
        found: list[str] = exc.args[1]
        return found
    return []


@pytest.mark.parametrize(
    ("imports", "modules"),
    [
        ({"a": {"b"}, "b": {"c"}}, set()),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, {"a", "b"}),
        ({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}, {"b", "c", "d"}),
    ],
)
def test_a_circle_is_found_where_there_is_one(imports: dict[str, set[str]], modules: set[str]) -> None:
    assert set(circle(imports)) == modules


def test_no_modules_import_one_another() -> None:
    assert "fedhlm" in PACKAGES
    # Imports inside functions and for type checking count: they are a reader's way, too.
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert circle({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}) == []
