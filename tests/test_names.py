"""A name stands for one thing: classes are not called alike, methods seldom; what is routed by a name is looked up in its table."""

import ast
from collections import defaultdict
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


# Classes that are called alike, and why they are: there are none.
ALIKE: dict[str, str] = {}
# Words that say little of a method; more than two of one name in a package are hard to tell apart.
PLAIN = {"take", "run", "add", "write"}
AT_MOST = 2


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


def classes(tree: ast.AST) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def test_no_two_classes_are_called_alike() -> None:
    found = defaultdict(list)
    for path in sources():
        for node in classes(ast.parse(path.read_text("utf-8"))):
            found[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(found) > 300
    twice = {name: places for name, places in found.items() if len(places) > 1}
    assert twice.keys() == ALIKE.keys(), {name: twice[name] for name in twice.keys() - ALIKE.keys()}


def test_plain_words_name_few_methods_of_a_package() -> None:
    found = defaultdict(list)
    for path in sources():
        for node in classes(ast.parse(path.read_text("utf-8"))):
            methods = (m.name for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef))
            for name in PLAIN & set(methods):
                found[str(path.parent.relative_to(ROOT)), name].append(f"{path.name}: {node.name}")
    assert len(found) > 10
    assert {place: where for place, where in found.items() if len(where) > AT_MOST} == {}
