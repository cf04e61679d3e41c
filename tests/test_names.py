"""What is routed by a name is looked up in its table, and compared with no name anywhere."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from edge_agent.learner import OBJECTIVES
from fedhlm import choices
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.learning.thresholds import OPTIMISERS
from fedhlm.protocol.sources import SOURCES

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
# By the last word of what holds the name: `config.gate`, `pipeline.kind`, `source`.
ROUTED: dict[str, Mapping[str, object]] = {
    "gate": choices.GATES,
    "peers": choices.PEERS,
    "threshold": choices.THRESHOLDS,
    "kind": choices.PIPELINES,
    "coupling": COUPLINGS,
    "objective": OBJECTIVES,
    "optimiser": OPTIMISERS,
    "source": SOURCES,
    "origin": SOURCES,
}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def comparisons(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each comparison of a routing choice with one of its names."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        held = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
        said = {leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)}
        if any(said & set(ROUTED[name]) for name in held & set(ROUTED)):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("config.peers == 'none'", True),
        ("config.threshold in ('paper-fl', 'fixed')", True),
        ("'gumbel' != sampling.coupling", True),
        ("source != 'cloud'", True),
        ("note.kind == 'sent'", False),
        ("choices.PEERS[config.peers].asked", False),
        ("config.threshold == other", False),
    ],
)
def test_a_comparison_is_found_where_there_is_one(code: str, found: bool) -> None:
    assert bool(list(comparisons(ast.parse(code)))) is found


def test_routing_choices_are_compared_with_no_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sources()
        for line, text in comparisons(ast.parse(path.read_text("utf-8")))
    ]
    assert found == []
