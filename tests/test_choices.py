"""Roles, sources and the choices of a preset are looked up in tables; the product compares none of their names."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from fedhlm import choices
from fedhlm.config import presets
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.learning.thresholds import OPTIMISERS
from fedhlm.protocol.messages import Presence
from fedhlm.protocol.roles import PARTS, ROLES
from fedhlm.protocol.sources import SOURCES
from fedhlm.protocol.topics import TABLE
from fedhlm_fleet.commands.common import PACKAGES
from fedhlm_fleet.pki.roles import CERTIFICATES

ROOT = Path(__file__).parents[1]
NAMES = frozenset[str]().union(
    *(choices.GATES, choices.PEERS, choices.THRESHOLDS, choices.OBJECTIVES, choices.PIPELINES),
    *(COUPLINGS, UNCERTAINTIES, OPTIMISERS, ROLES, CERTIFICATES, SOURCES, presets()),
)
# The same word for something else.
OTHERS = {
    ("fedhlm_doors/tools.py", "none"): "a value of tool_choice in the APIs over HTTP",
    ("fedhlm_fleet/flash/batch.py", "agent"): "a column of a table of devices",
    ("fedhlm_fleet/flash/bundle.py", "none"): "the ABI tag of a wheel",
    ("fedhlm_lab/sim/faults.py", "none"): "the word for no faults",
}


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every text that the code compares a value with: by an operator, in a pattern or by counting."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, comparators=right):
                operands = [left, *right]
            case ast.MatchValue(value=value):
                operands = [value]
            case ast.Call(func=ast.Attribute(attr="count" | "index" | "__eq__"), args=operands):
                pass
            case _:
                continue
        for operand in operands:
            held = operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]
            for item in held:
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.lineno, item.value


def test_the_product_compares_no_name_of_a_role_a_source_or_a_choice() -> None:
    found, used = [], set()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            for line, name in compared(ast.parse(path.read_text("utf-8"))):
                if (file, name) in OTHERS:
                    used.add((file, name))
                elif name in NAMES:
                    found.append(f"{file}:{line} compares with {name!r}")
    assert not found, found
    assert used == set(OTHERS), f"no longer needed: {sorted(set(OTHERS) - used)}"


@pytest.mark.parametrize(
    "code",
    [
        "if role == 'edge': pass",
        "if 'edge' != role: pass",
        "if role in ('agent', 'edge'): pass",
        "if {'edge'} <= set(publishers): pass",
        "match role:\n    case 'agent' | 'edge': pass",
        "match message:\n    case Presence(role='edge'): pass",
        "n = sources.count('edge')",
    ],
)
def test_every_way_of_comparing_a_name_is_seen(code: str) -> None:
    assert "edge" in [name for _, name in compared(ast.parse(code))]


def test_a_table_that_is_indexed_by_a_name_compares_nothing() -> None:
    assert not list(compared(ast.parse("if levels['edge'] == name and TABLE['edge'].relays: pass")))


def test_every_role_that_the_protocol_names_has_a_row() -> None:
    named = {role for topic in TABLE for role in (*topic.publishers, *topic.subscribers)}
    assert named == set(ROLES)
    assert set(ROLES) < set(CERTIFICATES)
    assert set(get_args(Presence.__annotations__["role"])) == set(ROLES)
    assert set(PARTS) < set(ROLES)
