"""Measure how often peers are right: the centroid rule and the verified-neighbour rule against the LLM, over theta.

``python -m fedhlm_lab.studies.neighbours [--prompts N] [--items FILE]`` lets the LLM continue news titles and runs
the SLM along its text. Both rules are asked about the tokens whose uncertainty is above a percentile. It takes a few
minutes on one thread.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.decoder import Decoder, DecoderInput
from fedhlm.decoding.sampling import perturbed_argmax, scores
from fedhlm.decoding.uncertainty import closed_form
from fedhlm.errors import FedhlmError
from fedhlm.peers.collaboration import fit_hit_ratio, simulate_hit_ratio
from fedhlm.peers.context_keys import DIMS, Projection, load_projection
from fedhlm.peers.neighbours import Centroid, Memory
from fedhlm.progress import progress
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.studies.command_line import COUNT, Parser, limited
from fedhlm_lab.studies.command_line import run as run_study
from fedhlm_zoo.evaluate import EngineModel
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder

THETAS: Final = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99)
TEMPERATURES: Final = (0.0, 0.8)
SIZES: Final = (64, 128, 256, 512, 1024, 2048, 4096)
FIXED_THETA: Final = 0.8


class TextTrace(NamedTuple):
    """The SLM's state along the LLM's own text, one row per token."""

    prompt: NDArray[np.int64]  # (n,) number of the prompt, in the order of the run
    step: NDArray[np.int64]  # (n,) position in the continuation
    u: NDArray[np.float64]  # (n,) closed form
    hidden: NDArray[np.float32]  # (n, h)
    draft: NDArray[np.int64]  # (n,) the SLM's token
    token: NDArray[np.int64]  # (n,) the LLM's token


class Outcomes(NamedTuple):
    """A rule's results on the uncertain tokens: cosine (nan without a match), and whether rule and SLM were right."""

    similarity: NDArray[np.float64]  # (m,)
    right: NDArray[np.bool_]  # (m,)
    own: NDArray[np.bool_]  # (m,)
    u: NDArray[np.float64]  # (m,)


def trace(llm: Path, slm: Path, titles: Sequence[str], *, tokens: int, temperature: float) -> TextTrace:
    """Run both models; prompt number i uses the noise of seed i for both."""
    large, small = EngineModel(llm), Decoder.load(slm)
    encoded = large.tokenizer.encode_batch([f"{t}\n" for t in titles], add_special_tokens=False)
    prompts = [[large.end_id, *e.ids[: large.context - tokens - 1]] for e in encoded]
    texts = large.continuations(prompts, tokens=tokens, temperature=temperature)
    rows: list[tuple[int, int, float, NDArray[np.float32], int, int]] = []
    with progress("texts drafted", len(texts)) as ended:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            for step, (logits, hidden) in enumerate(_walk(small, prompt, text)):
                # Token by token as in an agent, because a dynamic int8 model gives other results in blocks.
                draft = perturbed_argmax(scores(logits, Sampling(number, temperature)), number, len(prompt) + step)
                rows.append((number, step, closed_form(logits, draft), hidden, draft, text[step]))
            ended()
    columns = tuple(zip(*rows, strict=True))
    return TextTrace(
        np.array(columns[0], np.int64),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.float64),
        np.stack(columns[3]),
        np.array(columns[4], np.int64),
        np.array(columns[5], np.int64),
    )


def _walk(
    small: Decoder, prompt: Sequence[int], text: Sequence[int]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    cache, fed = small.empty_cache(), list(prompt)
    for token in text:
        result = small.forward([DecoderInput(cache, fed)])[0]
        if result.hidden is None:
            raise FedhlmError(f"{small.info.name} gives no hidden state: this study needs one")
        yield result.logits[-1], result.hidden[-1]
        cache, fed = result.cache, [token]


def ask_centroid(
    run: TextTrace, keys: NDArray[np.int8], uncertain: NDArray[np.bool_], *, agents: int, recent: int
) -> Outcomes:
    """The published rule: `agents` agents write one prompt each at the same pace and publish their uncertain tokens."""
    centroid = Centroid(lambda: 0.0, recent=recent)
    order = np.lexsort((run.prompt, run.step, run.prompt // agents))
    asked = [row for row in order.tolist() if uncertain[row]]
    similarity = []
    for row in asked:
        name = str(run.prompt[row] % agents)
        similarity.append(centroid.similarity(name, keys[row]))
        centroid.add(name, keys[row])
    own = run.draft[asked] == run.token[asked]
    # The rule accepts the agent's own draft, so it is right where the draft is.
    return Outcomes(np.array([np.nan if s is None else s for s in similarity]), own, own, run.u[asked])


class Rule(NamedTuple):
    """A rule: what the memory stores of a verified row, and what a match yields for the agent's row (None: no hit)."""

    remember: Callable[[TextTrace, int], int]
    settle: Callable[[TextTrace, int, int], int | None]


def _remember_token(run: TextTrace, row: int) -> int:
    return int(run.token[row])


# Only the first settles a token with the neighbours' own; the others decide whether the agent's draft may stay.
RULES: Final = {
    "neighbours' token": Rule(_remember_token, lambda run, row, token: token),
    "neighbours agree with the draft": Rule(
        _remember_token, lambda run, row, token: token if token == run.draft[row] else None
    ),
    "neighbours' drafts were right": Rule(
        lambda run, row: int(run.draft[row] == run.token[row]),
        lambda run, row, accepted: int(run.draft[row]) if accepted else None,
    ),
}


def ask_neighbours(
    run: TextTrace, keys: NDArray[np.int8], uncertain: NDArray[np.bool_], *, votes: int, rule: Rule
) -> Outcomes:
    """A verified-neighbour rule: the memory holds all tokens of earlier prompts and none of the same one."""
    memory = Memory(len(keys), keys.shape[1])
    asked, similarity, right = [], [], []
    for number in range(int(run.prompt[-1]) + 1):
        rows = np.flatnonzero(run.prompt == number).tolist()
        for row in rows:
            if uncertain[row]:
                match = memory.nearest(keys[row], votes)
                settled = None if match is None else rule.settle(run, row, match.token)
                asked.append(row)
                similarity.append(np.nan if match is None or settled is None else match.similarity)
                right.append(settled == run.token[row])
        for row in rows:
            memory.add(keys[row], rule.remember(run, row), "peer")
    own = run.draft[asked] == run.token[asked]
    return Outcomes(np.array(similarity), np.array(right, np.bool_), own, run.u[asked])


def print_curve(title: str, outcomes: Outcomes, out: Callable[[str], object]) -> None:
    """Print one line per theta: the share of hits, the share right among them, and the SLM's own share.

    "SLM there" is the SLM's share right on the same tokens. "SLM by u" is its share on equally many tokens of the
    smallest uncertainty: a rule below it is worth less than a higher threshold.
    """
    out(f"\n{title}\n  theta    hits  hit share   right   SLM there   SLM by u\n")
    surest = outcomes.own[np.argsort(outcomes.u, kind="stable")]  # (m,)
    for theta in THETAS:
        hit = outcomes.similarity >= theta  # nan compares false
        count = int(hit.sum())
        shares = "      -           -          -"
        if count:
            there, by_u = outcomes.own[hit].mean(), surest[:count].mean()
            shares = f"{outcomes.right[hit].mean():7.3f} {there:11.3f} {by_u:10.3f}"
        out(f"  {theta:5.2f} {count:7d} {count / max(1, hit.size):10.4f} {shares}\n")


def print_at_equal_uncertainty(title: str, outcomes: Outcomes, out: Callable[[str], object]) -> None:
    """Print the share of right drafts with and without a hit, per quintile of u.

    It shows what a rule adds to u.
    """
    out(
        f"\n{title}, drafts right at equal uncertainty, theta {FIXED_THETA}\n  quintile of u    hits  with hit   without\n"
    )
    hit = outcomes.similarity >= FIXED_THETA
    quintile = np.searchsorted(np.quantile(outcomes.u, (0.2, 0.4, 0.6, 0.8)), outcomes.u)  # (m,) 0..4
    for number in range(5):
        here = quintile == number
        shares = [
            f"{outcomes.own[chosen].mean():9.3f}" if chosen.any() else f"{'-':>9}"
            for chosen in (here & hit, here & ~hit)
        ]
        out(f"  {number + 1:13d} {int((here & hit).sum()):7d} {' '.join(shares)}\n")


def study(run: TextTrace, projections: dict[str, Projection], *, agents: int, percentile: float) -> None:
    """Print every table of one temperature."""
    out = sys.stdout.write
    uncertain = run.u > np.percentile(run.u, percentile)
    own = run.draft == run.token
    out(
        f"{len(own)} tokens of {run.prompt[-1] + 1} prompts; SLM right on {own.mean():.3f} of all, "
        f"on {own[uncertain].mean():.3f} of the {uncertain.sum()} uncertain (u above its {percentile:g}th percentile)\n"
    )
    for space, projection in projections.items():
        keys = np.stack([projection.key(h) for h in run.hidden])  # (n, dims) int8
        for recent in (1, 8):
            print_curve(
                f"centroid of {agents - 1} other agents, last {recent} keys each, {space} keys",
                ask_centroid(run, keys, uncertain, agents=agents, recent=recent),
                out,
            )
        for (name, rule), votes in product(RULES.items(), (1, 3)):
            outcomes = ask_neighbours(run, keys, uncertain, votes=votes, rule=rule)
            print_curve(f"{name}, votes {votes}, {space} keys", outcomes, out)
            print_at_equal_uncertainty(f"{name}, votes {votes}, {space} keys", outcomes, out)
        log = run.token[uncertain].tolist()
        # A memory larger than the log never fills, so its ratio says nothing about size.
        sizes = [s for s in SIZES if s <= len(log)]
        if not sizes:
            out(f"\nhit ratio by size: needs {min(SIZES)} uncertain tokens, of which there are {len(log)}\n")
            continue
        for votes in (1, 3):
            with progress("looking up all tokens in memories of each size"):
                ratios = simulate_hit_ratio(keys[uncertain], log, sizes, theta=FIXED_THETA, votes=votes)
            fit = fit_hit_ratio(sizes, ratios)
            out(
                f"\nhit ratio by size, votes {votes}, theta {FIXED_THETA}, {space} keys, log of {len(log)} uncertain tokens\n"
            )
            out(f"  alpha {fit.alpha:.3g}, R^2 {fit.r_squared:.3f}, worst distance {fit.worst:.3f}\n")
            out(
                "".join(
                    f"  S {s:5d}  H {h:.4f}  fitted {fit.ratio(s):.4f}\n" for s, h in zip(sizes, ratios, strict=True)
                )
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(prog="python -m fedhlm_lab.studies.neighbours", description="How often are peers right?")
    parser.add_argument("--prompts", type=COUNT, default=200, help="titles to continue")
    parser.add_argument("--items", type=Path, help="file of news items; default: those that ship with the project")
    parser.add_argument("--tokens", type=COUNT, default=48, help="tokens per continuation at most")
    parser.add_argument("--agents", type=COUNT, default=4, help="agents of the cluster, for the centroid rule")
    parser.add_argument(
        "--percentile",
        type=limited(float, 0, 100),
        default=40.0,
        help="tokens with u above this percentile are asked about",
    )
    parser.add_argument("--slm", default="", help="model folder; default: the shipped one")
    parser.add_argument("--llm", default="", help="model folder; default: the shipped one")
    given = parser.parse_args(arguments)
    slm, llm = model_folder(given.slm, "slm"), model_folder(given.llm, "llm")
    titles = [item.title for item in load_items(given.items)[: given.prompts]]
    for temperature in TEMPERATURES:
        sys.stdout.write(f"\n== temperature {temperature} ==\n")
        sys.stdout.flush()  # what follows takes long
        run = trace(llm, slm, titles, tokens=given.tokens, temperature=temperature)
        width = run.hidden.shape[1]
        # The published rule assumes raw embeddings: a space that is not centred.
        projections = {"fitted": load_projection(slm, width), "fallback": Projection.fallback(width, DIMS)}
        study(run, projections, agents=given.agents, percentile=given.percentile)
    return 0


if __name__ == "__main__":
    sys.exit(run_study(main, "python -m fedhlm_lab.studies.neighbours"))
