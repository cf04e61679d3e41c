"""Tokens per round trip and modelled tokens a second of chains and trees of drafts, with the shipped pair in one process.

No bus: a round is one draft and one settling, and takes the device's and the cloud's measured time plus the round trip
given. Every text is compared with the LLM alone. Run: python benchmarks/tree.py [--prompts 20] [--tokens 64]
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cloud_verifier.verifier import Block, Session, settle
from edge_agent.growth import RANKS, TreeLimits, TreeRequest
from edge_agent.model import Slm
from fedhlm.decoding.alone import Alone
from fedhlm.decoding.decoder import Cache, Decoder, DecoderInput
from fedhlm.decoding.tree import Branch
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.studies.command_line import COUNT, TEMPERATURE, Parser, limited
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder

Draft = tuple[list[int], Sequence[Branch]]
DELAY_WEIGHT = 0.1  # of the newest round in the running mean of the delay


@dataclass
class Totals:
    """Sums over all rounds of a variant."""

    tokens: int = 0
    rounds: int = 0
    llm_calls: int = 0
    nodes: int = 0
    device_s: float = 0.0
    cloud_s: float = 0.0

    def row(self, round_trip_s: float) -> dict[str, float]:
        """Figures for the table, at this round trip."""
        wall_s = self.device_s + self.cloud_s + self.rounds * round_trip_s
        return {
            "tokens_per_round": self.tokens / self.rounds,
            "nodes_per_round": self.nodes / self.rounds,
            "llm_calls_per_token": self.llm_calls / self.tokens,
            "device_ms_per_round": 1000.0 * self.device_s / self.rounds,
            "cloud_ms_per_round": 1000.0 * self.cloud_s / self.rounds,
            "tokens_per_second": self.tokens / wall_s,
        }


class Cloud:
    """One session of the LLM."""

    def __init__(self, decoder: Decoder, session: Session, totals: Totals) -> None:
        self.session = session
        self._decoder = decoder
        self._totals = totals
        self._cache: Cache = decoder.empty_cache()

    def settle(self, chain: list[int], branches: Sequence[Branch]) -> None:
        """Settle one block; the session's context grows."""
        block = Block(len(self.session.context), chain, 0, 1, [b""] * len(chain), tuple(branches))
        steps = settle(self.session, block)
        feed = next(steps)
        while True:
            result = self._decoder.forward([DecoderInput(self._cache.truncated(feed.keep), feed.ids)])[0]
            self._cache = result.cache
            self._totals.llm_calls += 1
            try:
                feed = steps.send(result.logits[-feed.rows :])
            except StopIteration:
                return


def measure(
    slm: Slm, llm: Decoder, texts: list[tuple[list[int], Sampling, list[int]]], draft: Callable[..., Draft]
) -> Totals:
    """Generate every text by `draft(ids, sampling, room, delay_s)`; `delay_s` is the cloud's own running mean."""
    totals = Totals()
    delay_s = 0.02
    eos = frozenset(llm.info.eos_ids)
    for prompt, sampling, text in texts:
        cloud = Cloud(llm, Session(sampling, llm.vocabulary.size, eos, list(prompt)), totals)
        context = cloud.session.context
        while len(context) < len(text):
            before = len(context)
            began = time.perf_counter()
            chain, branches = draft(context, sampling, len(text) - before, delay_s)
            drafted = time.perf_counter()
            cloud.settle(chain, branches)
            settled = time.perf_counter()
            totals.rounds += 1
            totals.nodes += len(chain) + len(branches)
            totals.tokens += min(len(context), len(text)) - before
            totals.device_s += drafted - began
            totals.cloud_s += settled - drafted
            delay_s += DELAY_WEIGHT * (settled - drafted - delay_s)
        if context[: len(text)] != text:
            raise AssertionError(f"text differs from the LLM's own: {context} instead of {text}")
    return totals


def chain_of(slm: Slm, block: int) -> Callable[..., Draft]:
    """A chain of fixed length."""

    def draft(ids: list[int], sampling: Sampling, room: int, _delay_s: float) -> Draft:
        chain: list[int] = []
        for _ in range(min(block, room)):
            chain.append(slm.draft([*ids, *chain], sampling).token)
            if chain[-1] in slm.decoder.info.eos_ids:
                break
        return chain, ()

    return draft


def grown(slm: Slm, nodes: int, width: int, round_trip_s: float) -> Callable[..., Draft]:
    """A tree (a chain where `width` is 1) of at most `nodes` nodes, as far as they pay at this round trip."""

    def draft(ids: list[int], sampling: Sampling, room: int, delay_s: float) -> Draft:
        tree = slm.grow(TreeRequest(ids, sampling, TreeLimits(nodes, width, room, round_trip_s + delay_s)))
        return [d.token for d in tree.chain], tree.branches

    return draft


def main() -> None:
    """Print a table and, last, JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--prompts", type=COUNT, default=20)
    parser.add_argument("--tokens", type=COUNT, default=64)
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.8)
    parser.add_argument("--blocks", type=COUNT, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--nodes", type=COUNT, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument(
        "--round-trips", type=limited(float, 0.0, 60_000.0), nargs="+", default=[0.0, 50.0, 200.0], metavar="MS"
    )
    options = parser.parse_args()
    llm = Decoder.load(model_folder("", "llm"), threads=1)
    small = Decoder.load(model_folder("", "slm"), threads=1)
    texts = []
    for number, item in enumerate(load_items()[: options.prompts]):
        sampling = Sampling(seed=number, temperature=options.temperature)
        prompt = llm.tokenizer.encode(item.title + "\n").ids
        texts.append((prompt, sampling, prompt + Alone(llm).write(prompt, sampling, options.tokens)))
    results: dict[str, dict[str, dict[str, float]]] = {f"{ms:g}": {} for ms in options.round_trips}
    for block in options.blocks:
        slm = Slm(small)
        totals = measure(slm, llm, texts, chain_of(slm, block))
        for ms in options.round_trips:
            results[f"{ms:g}"][f"chain of {block}"] = totals.row(ms / 1000.0)
    shapes = [("chain as it pays", max(options.nodes), 1), *((f"tree of {n}", n, RANKS) for n in options.nodes)]
    for ms in options.round_trips:
        for name, nodes, width in shapes:
            slm = Slm(small)
            totals = measure(slm, llm, texts, grown(slm, nodes, width, ms / 1000.0))
            results[f"{ms:g}"][name] = totals.row(ms / 1000.0)
    for ms, variants in results.items():
        print(f"round trip {ms} ms")
        base = variants.get("chain of 8")
        for name, row in variants.items():
            ratio = f"  x{row['tokens_per_second'] / base['tokens_per_second']:.2f}" if base else ""
            print(f"  {name:18}" + "  ".join(f"{key} {value:6.2f}" for key, value in row.items()) + ratio)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
