"""A name stands for one thing: classes are not called alike, methods seldom."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
# Classes that are called alike, and why they are: there are none.
ALIKE: dict[str, str] = {}
# Words that say little of a method; more than two of one name in a package are hard to tell apart.
PLAIN = {"take", "run", "add", "write"}
AT_MOST = 2


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


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
