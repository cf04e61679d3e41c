"""Trees travel unchanged, hostile bytes give ProtocolError only, and walking a tree finds what was put in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.decoding.tree import BRANCHES_MAX, Branch, Tree, pack_branches, unpack_branches
from fedhlm.errors import ProtocolError

VOCAB_SIZES = st.sampled_from([2, 48, 65_536, 65_537, 200_000])


@st.composite
def trees(draw: st.DrawFn, vocab_size: int = 5, nodes: int = 12) -> Tree:
    """Any tree, also one with equal siblings."""
    tokens = st.integers(0, vocab_size - 1)
    chain = draw(st.lists(tokens, max_size=nodes))
    count = draw(st.integers(0, nodes))
    return Tree(chain, [Branch(draw(st.integers(0, len(chain) + i)), draw(tokens)) for i in range(count)])


@given(data=st.data(), vocab_size=VOCAB_SIZES)
def test_unpack_inverts_pack(data: st.DataObject, vocab_size: int) -> None:
    tree = data.draw(trees(vocab_size))
    packed = pack_branches(tree.branches, vocab_size)
    assert unpack_branches(packed, vocab_size, len(tree.chain)) == tree.branches


@given(payload=st.binary(max_size=64), vocab_size=VOCAB_SIZES, chain_length=st.integers(0, 8))
def test_hostile_bytes_give_a_tree_or_a_protocol_error(payload: bytes, vocab_size: int, chain_length: int) -> None:
    try:
        branches = unpack_branches(payload, vocab_size, chain_length)
    except ProtocolError:
        return
    Tree([0] * chain_length, branches)
    assert pack_branches(branches, vocab_size) == payload


def test_errors_name_the_branch() -> None:
    with pytest.raises(ProtocolError, match="parent of branch 1 must be at most 3"):
        unpack_branches(pack_branches([Branch(2, 1), Branch(4, 1)], 9), 9, 2)
    with pytest.raises(ProtocolError, match="multiple of 4"):
        unpack_branches(b"12345", 9, 2)
    with pytest.raises(ProtocolError, match="below 9"):
        unpack_branches(pack_branches([Branch(0, 9)], 10), 9, 2)
    with pytest.raises(ProtocolError, match="multiple of 4 bytes, at most"):
        unpack_branches(bytes(4 * (BRANCHES_MAX + 1)), 9, 2)
    with pytest.raises(ValueError, match="branches must be at most"):
        pack_branches([Branch(0, 0)] * (BRANCHES_MAX + 1), 9)
    with pytest.raises(ValueError, match="parent of node 2"):
        Tree([7], [Branch(2, 1)])


def paths(tree: Tree) -> set[tuple[int, ...]]:
    """The token paths from the root to every node, found from the parents alone."""
    parents = [*range(len(tree.chain)), *(b.parent for b in tree.branches)]
    found: list[tuple[int, ...]] = [()]
    for parent, token in zip(parents, tree.tokens, strict=True):
        found.append((*found[parent], token))
    return set(found)


def walk(tree: Tree, path: tuple[int, ...]) -> int | None:
    node: int | None = 0
    for token in path:
        assert node is not None
        node = tree.child(node, token)
        if node is None:
            break
    return node


@given(tree=trees())
def test_the_main_path_leads_down_the_chain_and_on_to_a_leaf(tree: Tree) -> None:
    path = tree.chain_below(0)
    assert path[: len(tree.chain)] == list(range(1, len(tree.chain) + 1))
    leaf = path[-1] if path else 0
    assert tree.chain_below(leaf) == []
    assert tree.depth == max(len(p) for p in paths(tree))


@given(tree=trees(vocab_size=50))
def test_every_first_path_of_a_kind_can_be_walked(tree: Tree) -> None:
    for path in paths(tree):
        # Below the second of two equal siblings nothing is reached: the first one counts.
        node = walk(tree, path)
        assert node is None or tree.tokens[node - 1 : node] == path[-1:]
    for node, (parent, token) in enumerate(tree.branches, start=len(tree.chain) + 1):
        assert tree.child(parent, token) in range(1, node + 1)


@given(tree=trees(), data=st.data())
def test_below_keeps_exactly_the_paths_through_the_settled_chain(tree: Tree, data: st.DataObject) -> None:
    steps = data.draw(st.integers(0, len(tree.chain)))
    lower = tree.below(steps)
    assert lower.chain == tree.chain[steps:]
    through = _paths_under(tree, steps)
    assert paths(lower) == through


def _paths_under(tree: Tree, steps: int) -> set[tuple[int, ...]]:
    parents = [*range(len(tree.chain)), *(b.parent for b in tree.branches)]
    found: dict[int, tuple[int, ...]] = {steps: ()}
    for node, (parent, token) in enumerate(zip(parents, tree.tokens, strict=True), start=1):
        if parent in found and node > steps:
            found[node] = (*found[parent], token)
    return set(found.values())
