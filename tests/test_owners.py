"""What a module keeps for itself is read by nobody else: no private name is imported, and no saved struct is copied."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedhlm_fleet.commands.common import PACKAGES

ROOT = Path(__file__).parents[1]
COPIED_FROM = 3  # structs with fewer fields may be alike by chance


@functools.cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return tuple((path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))) for path in paths)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def borrowed(tree: ast.AST) -> Iterator[str]:
    """Private names that a module takes from another one: by import, or a class as an attribute of something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr.lstrip("_")[:1].isupper():
            yield node.attr


def structs(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The structs of a module that travel or are saved, by name, with the names of their fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Struct") for base in node.bases):
            yield (
                node.name,
                tuple(
                    item.target.id
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                ),
            )


def test_no_module_borrows_a_private_name() -> None:
    assert [f"{file}: {name}" for file, tree in modules() for name in borrowed(tree)] == []


def test_no_struct_is_written_down_twice() -> None:
    owners: dict[tuple[str, ...], list[str]] = {}
    for file, tree in modules():
        for name, fields in structs(tree):
            if len(fields) >= COPIED_FROM:
                owners.setdefault(fields, []).append(f"{file}: {name}")
    assert len(owners) > 20
    assert [twins for twins in owners.values() if len(twins) > 1] == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from edge_broker.memory import _MemorySnapshot", "_MemorySnapshot"),
        ("kind = memory._MemorySnapshot", "_MemorySnapshot"),
        ("from fedhlm.peers.neighbours import _snapshots as kept", "_snapshots"),
    ],
)
def test_a_borrowed_name_is_seen(code: str, name: str) -> None:
    assert list(borrowed(ast.parse(code))) == [name]


def test_the_fields_of_a_struct_are_seen() -> None:
    code = "class Kept(msgspec.Struct, array_like=True):\n    space: str\n    keys: bytes = b''\n    LIMIT = 3\n"
    assert list(structs(ast.parse(code))) == [("Kept", ("space", "keys"))]
