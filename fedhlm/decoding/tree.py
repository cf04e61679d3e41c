"""Tree drafts: a main chain of tokens with branches, and their encoding.

Node 0 is the root, which is the position before the first draft. Nodes 1..L are the main chain. The branches follow in
the order in which they are sent. A parent comes before its children. Of equal children of a node the first counts.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from fedhlm.errors import ProtocolError
from fedhlm.protocol.fields import MAX_BLOCK
from fedhlm.protocol.packing import id_bytes, pack_ids, unpack_ids

BRANCHES_MAX: Final = MAX_BLOCK
PARENT_BYTES: Final = 2
PARENT_MAX: Final = 2 ** (8 * PARENT_BYTES) - 1


class Branch(NamedTuple):
    """A node beside the main chain: the number of its parent node, and its token."""

    parent: int
    token: int


class Tree:
    """A tree draft. `chain` holds the tokens of nodes 1..L, and `branches` the nodes from L+1 on.

    Raises:
        ValueError: a parent does not come before its child.
    """

    def __init__(self, chain: Sequence[int], branches: Sequence[Branch] = ()) -> None:
        self.chain = tuple(chain)
        self.branches = tuple(branches)
        self.tokens = (*self.chain, *(b.token for b in branches))  # the token of node n is at index n - 1
        self._children: list[dict[int, int]] = [{} for _ in range(len(self.tokens) + 1)]  # token -> node
        depths = [0] * (len(self.tokens) + 1)
        parents = (*range(len(self.chain)), *(b.parent for b in branches))
        for node, (parent, token) in enumerate(zip(parents, self.tokens, strict=True), start=1):
            if not 0 <= parent < node:
                raise ValueError(f"parent of node {node} must be a node before it (got {parent})")
            self._children[parent].setdefault(token, node)
            depths[node] = depths[parent] + 1
        self.depth = max(depths)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` with this token; None where there is none."""
        return self._children[node].get(token)

    def chain_below(self, node: int) -> list[int]:
        """The nodes below `node` along first children, which the sender considers the likeliest."""
        path: list[int] = []
        while children := self._children[node]:
            node = next(iter(children.values()))
            path.append(node)
        return path

    def below(self, steps: int) -> "Tree":
        """Return the subtree that remains when the first `steps` tokens of the main chain are accepted.

        Raises:
            ValueError: `steps` is negative or larger than the length of the main chain.
        """
        length = len(self.chain)
        if not 0 <= steps <= length:
            raise ValueError(f"steps must be 0..{length} (got {steps})")
        renamed = {node: node - steps for node in range(steps, length + 1)}
        kept: list[Branch] = []
        for node, (parent, token) in enumerate(self.branches, start=length + 1):
            if parent in renamed:
                kept.append(Branch(renamed[parent], token))
                renamed[node] = length - steps + len(kept)
        return Tree(self.chain[steps:], kept)


def pack_branches(branches: Sequence[Branch], vocab_size: int) -> bytes:
    """Encode all tokens (see `pack_ids`), then all parents as little-endian uint16.

    Raises:
        ValueError: there are more than BRANCHES_MAX branches, or a number does not fit. This is a bug of the caller.
    """
    parents = [b.parent for b in branches]
    if len(branches) > BRANCHES_MAX or not all(0 <= p <= PARENT_MAX for p in parents):
        raise ValueError(
            f"branches must be at most {BRANCHES_MAX}, with parents up to {PARENT_MAX} (got {len(branches)})"
        )
    return pack_ids([b.token for b in branches], vocab_size) + np.array(parents, "<u2").tobytes()


def unpack_branches(data: bytes, vocab_size: int, chain_length: int) -> tuple[Branch, ...]:
    """Decode the bytes of `pack_branches` for a main chain of `chain_length` tokens.

    Raises:
        ProtocolError: the length is not a whole number of branches, there are too many, an id is outside the
            vocabulary, or a parent does not come before its child.
    """
    width = id_bytes(vocab_size) + PARENT_BYTES
    count, rest = divmod(len(data), width)
    if rest or count > BRANCHES_MAX:
        raise ProtocolError(
            f"branches must be a multiple of {width} bytes, at most {BRANCHES_MAX * width} (got {len(data)})"
        )
    split = count * id_bytes(vocab_size)
    tokens = unpack_ids(data[:split], vocab_size)
    parents = np.frombuffer(data[split:], "<u2")  # (count,)
    late = np.flatnonzero(parents > chain_length + np.arange(count))  # branch i is node chain_length + 1 + i
    if late.size:
        i = int(late[0])
        raise ProtocolError(f"parent of branch {i} must be at most {chain_length + i} (got {parents[i]})")
    return tuple(Branch(int(p), t) for p, t in zip(parents, tokens, strict=True))
