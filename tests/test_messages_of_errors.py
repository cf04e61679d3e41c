"""Every error reads `KEY must be EXPECTED (got VALUE)`: the old order of words is found in the source, wherever it stands."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedhlm.errors import ConfigError, UnknownKey

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(
    found.parent.name for found in ROOT.glob("*/__init__.py") if found.parent.name not in {"tests", "benchmarks"}
)
# "X is Y: Z expected", "Z expected, W", "Y: expected Z" and "X is Y: hint": a value stands for {...}.
OLD_SHAPES = (
    re.compile(r"\bexpected\b"),
    re.compile(r"\b(is|are|has|have) \{\}: "),
)
NOT_MESSAGES = re.compile(r"expected (tokens|harm|value)s?\b")


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every text of a module that is no docstring, with {} for each value in it."""
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and not isinstance(parents[node], ast.Expr | ast.JoinedStr):
            yield node.lineno, str(node.value)


def old_shapes(source: str) -> list[tuple[int, str]]:
    return [
        (line, text)
        for line, text in texts(ast.parse(source))
        if any(shape.search(text) for shape in OLD_SHAPES) and not NOT_MESSAGES.search(text)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_message_has_the_old_order_of_words(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in files
        for line, text in old_shapes(file.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        'raise ValueError(f"votes is {votes}: at least 1 expected")',
        'raise ConfigError("--name", name, "1..64 characters expected")',
        'raise ModelError(f"{path} lacks {missing}: expected a decoder")',
        'raise ProtocolError(f"message.version is {version}: this side speaks {VERSION}")',
    ],
)
def test_the_old_order_is_noticed(line: str) -> None:
    assert old_shapes(line)


def test_a_docstring_and_a_name_are_no_messages() -> None:
    assert not old_shapes('def f(expected):\n    """What is expected."""\n    return g(expected=expected)\n')


def test_an_error_names_key_expectation_value_source_and_reason() -> None:
    error = ConfigError(
        "agent.state", "/x", "a writable folder", why="Permission denied", source="env FEDHLM_AGENT__STATE"
    )
    assert (
        str(error) == "agent.state must be a writable folder (got '/x' from env FEDHLM_AGENT__STATE: Permission denied)"
    )
    assert str(ConfigError("--out", None, "a file")) == "--out must be a file (got nothing)"
    assert str(UnknownKey("gaet", 1, "did you mean gate?", source="file x")) == (
        "gaet is not a known key: did you mean gate? (got 1 from file x)"
    )
