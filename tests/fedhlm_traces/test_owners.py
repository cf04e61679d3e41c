"""What a part packs for itself is unpacked by that part: a check asks the part, and knows no layout of its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedhlm_fleet.commands.common import PACKAGES

ROOT = Path(__file__).parents[2]

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def called(node: ast.AST) -> str:
    """The last word of what a call calls."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def foreign_snapshots(tree: ast.AST) -> Iterator[int]:
    """Lines that decode the snapshot of an object that is not `self`."""
    for node in ast.walk(tree):
        if called(node) in ("decode", "unpack", "Decoder"):
            inner = (n for argument in node.args for n in ast.walk(argument))  # type: ignore[attr-defined]
            for call in inner:
                if called(call) == "snapshot" and ast.unparse(call.func.value) != "self":  # type: ignore[attr-defined]
                    yield call.lineno  # type: ignore[attr-defined]


def private_of_others(tree: ast.AST, packages: tuple[str, ...] = PACKAGES) -> Iterator[tuple[int, str]]:
    """Private names that are imported from another module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in packages:
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    yield node.lineno, f"{node.module}.{alias.name}"


def packed_layouts(tree: ast.AST) -> Iterator[str]:
    """Structs that are packed as arrays: layouts of bytes, not values of the program."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(k.arg == "array_like" for k in node.keywords):
            yield node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_snapshot_is_read_by_its_owner_only(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert not list(foreign_snapshots(tree))
    assert not list(private_of_others(tree))
    if path.is_relative_to(ROOT / "fedhlm_traces" / "check"):
        assert not list(packed_layouts(tree))


def test_the_rules_can_be_broken() -> None:
    stolen = ast.parse("class Kept(Struct, array_like=True): pass\nkept = msgpack.decode(memory.snapshot(), type=Kept)")
    assert list(foreign_snapshots(stolen)) == [2]
    assert list(packed_layouts(stolen)) == ["Kept"]
    assert not list(foreign_snapshots(ast.parse("msgpack.decode(self.snapshot(), type=Kept)")))
    assert list(private_of_others(ast.parse("from edge_broker.memory import _Snapshot"))) == [
        (1, "edge_broker.memory._Snapshot")
    ]
