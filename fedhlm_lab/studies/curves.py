"""Measure harm against doubt (u against beta), and compare two ways of learning a threshold over 30 rounds.

Real models write news titles on, and every draft is verified, so nothing is censored.
Run: python -m fedhlm_lab.studies.curves [--prompts 200]
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.events import Observation
from fedhlm.config import load
from fedhlm.decoding.laws import BETA_INTERCEPT, BETA_SLOPE
from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.learning.curve import Curve, affine, correlation, isotonic, midpoints
from fedhlm.learning.thresholds import (
    KEEP_NONE,
    OPTIMISERS,
    LocalRound,
    PaperSettings,
    cluster_mean,
    global_mean,
    tau_of_budget,
)
from fedhlm.progress import progress
from fedhlm.settings import Generation
from fedhlm_lab.sim.shipped import shipped_pair
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.studies.command_line import COUNT, TEMPERATURE, Parser
from fedhlm_lab.studies.command_line import run as run_study
from fedhlm_lab.studies.compare import AGENTS, CLUSTERS, Oracle, observations_of, run_fleet, tasks_of
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder

PLACES: Final = CLUSTERS * AGENTS
Pairs = NDArray[np.float64]  # (n, 3): u, beta, harm


def observed(options: argparse.Namespace, coupling: str, uncertainty: str) -> list[Pairs]:
    """(u, beta, harm) of every verified draft, for each agent, in order."""
    flags = {"generation.coupling": coupling, "generation.uncertainty": uncertainty}
    config = load(preset="exact", environ={}, flags=flags).config
    slm, llm = model_folder("", "slm"), model_folder("", "llm")
    pair, large = shipped_pair(slm, llm), Oracle(llm)
    articles = load_items(options.items)[: options.prompts]
    tasks = tasks_of(articles, "continue", large.decoder, tokens=options.tokens, temperature=options.temperature)
    groups = []
    with progress(f"texts, {coupling} and {uncertainty}", len(tasks)) as ended:
        for place in range(PLACES):
            parts = [tasks[place::PLACES] if p == place else [] for p in range(PLACES)]
            done, _ = run_virtual(partial(run_fleet, pair, config, parts, 0.0, None, ended)())
            groups.append(np.array([row(o) for o in observations_of(done)], np.float64).reshape(-1, 3))
    return groups


def row(seen: Observation) -> tuple[float, float, float]:
    """One observation as numbers."""
    return seen.uncertainty, seen.beta, seen.beta if seen.harm is None else seen.harm


def curve_of(pairs: Pairs, column: int) -> Curve:
    """The curve of beta (1) or harm (2)."""
    curve = Curve.empty()
    for line in pairs:
        curve.see(float(line[0]))
        curve.add(float(line[0]), float(line[column]))
    return curve


def paper_rounds(groups: Sequence[Pairs], rounds: int, settings: PaperSettings, start: float) -> list[float]:
    """The published threshold after each round: every agent learns from its share of the round's transmitted tokens."""
    tau, controls, server = start, [0.0] * len(groups), 0.0
    trace = []
    for number in range(rounds):
        updates = []
        for k, pairs in enumerate(groups):
            part = np.array_split(pairs, rounds)[number]
            sent = part[part[:, 0] > tau][:, :2]
            update = OPTIMISERS[settings.optimiser](LocalRound(sent, tau, tau, controls[k], server, number, settings))
            controls[k] = update.control
            updates.append(update)
        server = sum(controls) / len(controls)
        clusters = [cluster_mean(updates[c::CLUSTERS]) for c in range(CLUSTERS)]
        known = [mean for mean in clusters if mean is not None]
        tau = global_mean(known) if known else tau  # type: ignore[assignment]  # not None: known is not empty
        trace.append(tau)
    return trace


def calibrated_rounds(groups: Sequence[Pairs], rounds: int, budget: float) -> list[float]:
    """The calibrated threshold after each round, on the pooled sums, as if every kept token had been observed."""
    pooled = Curve.empty()
    trace = []
    for number in range(rounds):
        for pairs in groups:
            pooled = pooled + curve_of(np.array_split(pairs, rounds)[number], 2)
        trace.append(tau_of_budget(pooled, isotonic(pooled), budget, 0.05))
    return trace


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog="python -m fedhlm_lab.studies.curves", description="u against beta, and thresholds by round")
    parser.add_argument("--prompts", type=COUNT, default=200)
    parser.add_argument("--tokens", type=COUNT, default=48)
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.8)
    parser.add_argument("--rounds", type=COUNT, default=30)
    parser.add_argument("--items", type=Path)
    options = parser.parse_args(arguments)
    print(
        f"U-HLM's line: beta = {BETA_SLOPE} u {BETA_INTERCEPT:+}\n\n| coupling | u | tokens | corr(u, beta) | a | b | corr(u, harm) |"
    )
    print("|" + "---|" * 7)
    sys.stdout.flush()  # what follows takes long
    kept: dict[str, list[Pairs]] = {}
    for coupling, uncertainty in [(c, u) for c in ("gumbel", "greedy") for u in UNCERTAINTIES]:
        groups = observed(options, coupling, uncertainty)
        pairs = np.concatenate(groups)
        beta, harm = curve_of(pairs, 1), curve_of(pairs, 2)
        a, b = affine(beta)
        print(
            f"| {coupling} | {uncertainty} | {len(pairs)} | {correlation(beta):.3f} | {a:.2f} | {b:+.2f} | {correlation(harm):.3f} |",
            flush=True,
        )
        if uncertainty == Generation().uncertainty:
            kept[coupling] = groups
    for coupling, groups in kept.items():
        harm = curve_of(np.concatenate(groups), 2)
        m, shares = isotonic(harm), harm.seen / harm.total_seen
        print(f"\n{coupling}: m(u) of harm, and the share of tokens below u")
        for u in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            below = midpoints() < u
            print(
                f"  u <= {u:.1f}: m {m[below][-1]:.3f}, tokens {shares[below].sum():.3f}, harm so far {(shares * m)[below].sum():.4f}"
            )
    show = [*(n for n in (0, 1, 2, 4, 9, 14, 19) if n < options.rounds - 1), options.rounds - 1]
    print(f"\nthreshold after round {[n + 1 for n in show]}, from 0.3 (greedy for the paper's rule)")
    for name in OPTIMISERS:
        trace = paper_rounds(kept["greedy"], options.rounds, PaperSettings(10.0, 0.001, 0.1, 0.01, 0.1, name), 0.3)
        print(f"  paper-fl, {name}: {[round(trace[n], 3) for n in show]}")
    for coupling, groups in kept.items():
        for budget in (0.02, 0.05, 0.1):
            trace = calibrated_rounds(groups, options.rounds, budget)
            shown = ["none" if trace[n] == KEEP_NONE else round(trace[n], 3) for n in show]
            print(f"  calibrated-fl, {coupling}, budget {budget}: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(run_study(main, "python -m fedhlm_lab.studies.curves"))
