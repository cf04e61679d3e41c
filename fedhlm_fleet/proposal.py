"""The pipeline that suits a pair on a link, by closed formulas (docs/models.md): what each shape of a draft would give.

The tokens of a round trip are divided by its time. Acceptance is taken to be the same at every position, and the
model of a device to draft one token a step. A longer round trip never makes the best block or tree smaller, because a
further draft costs the same then, and a smaller share of the time.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from fedhlm_lab.sim.pace import ModelPace

BLOCKS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # lengths of a block that are compared
AHEAD: Final = (2, 3, 4, 6, 8)  # blocks in flight that are compared
NODES: Final = (2, 4, 8, 16, 24, 32, 48, 64)  # sizes of a tree that are compared


class PairRates(NamedTuple):
    """What a pair was measured to do.

    `ranks` are the shares of positions at which the LLM draws the SLM's first, second, ... candidate under shared
    noise. `step_s` is the time of a draft on the device, and `large` the pace of the LLM.
    """

    ranks: tuple[float, ...]
    step_s: float
    large: ModelPace


class PipelineChoice(NamedTuple):
    """A shape of drafts, the settings of `generation.pipeline` that make it, and the tokens a second that it gives."""

    shape: str
    settings: Mapping[str, str | int]
    tokens_s: float


def fastest(rates: PairRates, round_trip_s: float) -> list[PipelineChoice]:
    """The best block that is waited for, the best blocks in flight and the best tree on a link, the fastest first.

    Args:
        rates: the pair.
        round_trip_s: from the device to the cloud and back, without computing.
    """
    found = [best(rates, round_trip_s) for best in (best_block, best_ahead, best_tree)]
    return sorted(found, key=lambda choice: -choice.tokens_s)


def best_block(rates: PairRates, round_trip_s: float) -> PipelineChoice:
    """The block after which the device waits: 1 + a + ... + a^n tokens for n drafts, with a bonus or corrected token."""

    def speed(block: int) -> float:
        tokens = math.fsum(_first(rates) ** count for count in range(block + 1))
        return tokens / (_block_s(rates, block) + round_trip_s)

    block = max(BLOCKS, key=speed)
    settings: dict[str, str | int] = {"kind": "blocking", "window": block, "block": block}
    return PipelineChoice(f"blocks of {block}", settings, speed(block))


def best_ahead(rates: PairRates, round_trip_s: float) -> PipelineChoice:
    """The blocks that are drafted on while verdicts are on their way.

    A rejection takes the whole way of a block, and everything in flight with it. Until then a block is settled every
    time that the slowest of drafting, verifying and the window lets through.
    """
    first = _first(rates)

    def speed(shape: tuple[int, int]) -> float:
        block, ahead = shape
        way_s = _block_s(rates, block) + round_trip_s
        every_s = max(block * rates.step_s, rates.large.seconds(block + 1), way_s / ahead)
        whole = first**block
        if whole >= 1.0:
            return block / every_s
        return 1.0 / (1.0 - first) / (way_s + whole / (1.0 - whole) * every_s)

    block, ahead = max(((block, ahead) for block in BLOCKS for ahead in AHEAD), key=speed)
    settings: dict[str, str | int] = {"kind": "async", "window": block * ahead, "block": block}
    return PipelineChoice(f"{ahead} blocks of {block} in flight", settings, speed((block, ahead)))


def best_drafts(rates: PairRates) -> int:
    """How many tokens the SLM drafts beside the LLM before each of its calls; 0 where drafts cost more than they give."""
    beside = best_block(rates, 0.0)
    return int(beside.settings["block"]) if beside.tokens_s > 1.0 / rates.large.seconds(1) else 0


def best_tree(rates: PairRates, round_trip_s: float) -> PipelineChoice:
    """The tree of alternatives that is waited for. The cloud calls the LLM once more for each change of the path."""
    likeliest = reaches(rates.ranks, max(NODES))

    def speed(nodes: int) -> float:
        kept = likeliest[:nodes]
        chain = sum(reach.chain for reach in kept)
        changes = math.fsum(reach.share for reach in kept if reach.aside)
        verify_s = rates.large.seconds(chain + 1) + changes * rates.large.seconds(1)
        tokens = 1.0 + math.fsum(reach.share for reach in kept)
        return tokens / (nodes * rates.step_s + verify_s + round_trip_s)

    nodes = max(NODES, key=speed)
    return PipelineChoice(f"trees of {nodes}", {"kind": "tree", "nodes": nodes}, speed(nodes))


class Reach(NamedTuple):
    """A node of a tree: the chance that the text passes through it, whether it lies on the chain of first candidates,
    and whether it is another candidate than the first of its parent."""

    share: float
    chain: bool
    aside: bool


def reaches(ranks: Sequence[float], nodes: int) -> list[Reach]:
    """The likeliest nodes of a tree, the likeliest first, with the same chances below every node."""
    chances = [share for share in ranks if share > 0.0]
    open_nodes = [(-1.0, 0, True)]
    found: list[Reach] = []
    waiting: list[tuple[float, int, bool, bool]] = []
    number = 0
    while len(found) < nodes and (open_nodes or waiting):
        for share, _, chain in open_nodes:
            for rank, chance in enumerate(chances):
                number += 1
                heapq.heappush(waiting, (share * chance, number, chain and not rank, bool(rank)))
        if not waiting:
            break
        share, _, chain, aside = heapq.heappop(waiting)
        found.append(Reach(-share, chain, aside))
        open_nodes = [(share, 0, chain)]
    return found


def _first(rates: PairRates) -> float:
    return rates.ranks[0] if rates.ranks else 0.0


def _block_s(rates: PairRates, block: int) -> float:
    """Seconds to draft a block and to verify it with the token before it."""
    return block * rates.step_s + rates.large.seconds(block + 1)
