"""Counters that count: every exported one is raised somewhere, and whatever a part counts for itself is exported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedhlm.metrics import BY_NAME

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedhlm", "edge_agent", "edge_broker", "cloud_verifier")
# Attributes that grow and are no counts of what happened, with what they are.
NO_COUNTS = {
    "_joined": "the number of a member, in order of joining",
    "_approximate": "figure of one answer; the cloud counts approximate_tokens",
    "_asked": "the next request's name",
    "_running": "blocks that run now",
    "_bytes": "what a queue holds now",
    "_count": "what a queue holds now",
    "_failures": "attempts in a row",
    "_number": "names a message under way",
    "_out_bytes": "what waits for the socket now",
    "_yields": "takeovers in a row",
    "breaks": "links that broke under one message",
    "_doubts_held": "what a memory holds now",
    "_first": "the number of a journal's first note",
    "_fresh": "rows since the last profile",
    "_links": "links that are up now",
    "_now": "a logical clock",
    "_pending_bytes": "what waits now",
    "_positions": "positions of a profile",
    "_releases": "privacy budget, part of the state that is saved",
    "_revision": "names a tail",
    "_rounds": "the age of a choice of clusters",
    "count": "tokens of one request, part of its answers",
    "epoch": "names an epoch",
    "evictions": "how often one block lost its cache; all together are evicted_caches",
    "moves": "names a connection",
    "refused": "part of the contributions that travel; the service counts refused_contributions",
    "round": "names a round",
    "sessions": "a sum of the estimate of the risk, exported as risk_generations",
    "weight": "a weight, not a count",
    # Bytes and messages of one generation, in its answer; what is not uplink is in sent_bytes.
    "cluster_bytes": "figure of one answer",
    "round_trips": "figure of one answer",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text("utf-8"))


def calls(tree: ast.AST, *methods: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in methods:
            yield node


def raised(tree: ast.AST) -> set[str]:
    """The counts that a module raises or lets be read."""
    names = {
        literal.value
        for call in calls(tree, "add", "set", "observe", "measure")
        if call.args
        for literal in ast.walk(call.args[0])
        if isinstance(literal, ast.Constant) and isinstance(literal.value, str)
    }
    return names | {
        word.arg for call in calls(tree, "add_all", "set_all", "follow") for word in call.keywords if word.arg
    }


def exported(tree: ast.AST) -> set[str]:
    """The attributes whose values a module hands to the counters."""
    followed = {
        word.value.value
        for call in calls(tree, "follow")
        for word in call.keywords
        if isinstance(word.value, ast.Constant) and isinstance(word.value.value, str)
    }
    given = (
        value for call in calls(tree, "add", "add_all") for value in (*call.args, *(w.value for w in call.keywords))
    )
    return followed | {node.attr for value in given for node in ast.walk(value) if isinstance(node, ast.Attribute)}


def counted(tree: ast.AST) -> set[str]:
    """The attributes that a module raises by whole numbers: `x.name += 1`, `+= len(...)`, `+= count`, `name[...] += 1`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and whole(node.value):
            target = node.target.value if isinstance(node.target, ast.Subscript) else node.target
            if isinstance(target, ast.Attribute):
                found.add(target.attr)
    return found


def whole(value: ast.expr) -> bool:
    match value:
        case ast.Constant(value=int()):
            return True
        case ast.Call(func=ast.Name(id="len" | "publish_wire_bytes")) | ast.Call(func=ast.Attribute(attr="_drop")):
            return True
        case ast.BinOp(left=left, right=right):
            return whole(left) and whole(right)
        case ast.IfExp(body=body, orelse=orelse):
            return whole(body) and whole(orelse)
        case _:
            return False


def test_every_exported_count_is_raised_somewhere() -> None:
    names = set().union(*(raised(tree) for _, tree in sources()))
    assert not sorted(BY_NAME.keys() - names)


def test_what_a_part_counts_is_exported_or_is_no_count() -> None:
    out = set().union(*(exported(tree) for _, tree in sources()))
    kept = [f"{file}: {name}" for file, tree in sources() for name in sorted(counted(tree) - out - NO_COUNTS.keys())]
    assert not kept


def test_the_list_of_what_is_no_count_names_what_there_is() -> None:
    there = {node.attr for _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not sorted(NO_COUNTS.keys() - there)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("self.lost += 1", "lost"),
        ("self._tally.lost += len(items)", "lost"),
        ("self.lost[reason] += 1", "lost"),
        ("self.lost += len(a) - len(b)", "lost"),
    ],
)
def test_a_new_count_is_noticed(line: str, name: str) -> None:
    assert counted(ast.parse(line)) == {name}
    assert not exported(ast.parse(line))


def test_a_call_site_is_what_raises_or_follows() -> None:
    tree = ast.parse(
        "c.add('a' if x else 'b', n.size)\nc.add_all(d=t.drafted)\nc.follow(s, e='evicted')\nlog.info('f')"
    )
    assert raised(tree) == {"a", "b", "d", "e"}
    assert {"size", "drafted", "evicted"} <= exported(tree)
