"""What FedHLM's runs show: tables, charts, and the paper's values beside ours. Pure functions of the runs.

Each figure follows from the runs of one seed, and is then joined over all seeds.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedhlm.protocol.sources import SOURCES
from fedhlm_lab.papers.device import LabOutcome
from fedhlm_lab.papers.experiment import PaperValue
from fedhlm_lab.papers.fedhlm import (
    BASELINES,
    CALIBRATED,
    CENTRAL,
    PUBLISHED,
    FedhlmRuns,
    entropy_of,
    hit_ratio,
    in_round,
    of_client,
    settled,
    share,
)
from fedhlm_lab.papers.findings import ChartSeries, LabChart, LabResult, LabTable, PaperRow
from fedhlm_lab.papers.intervals import CONFIDENCE, SeedMean, mean_of
from fedhlm_lab.papers.over_seeds import over_seeds
from fedhlm_lab.papers.rerun import reruns_table
from fedhlm_lab.papers.rounds import RunRecord

LAYERS: Final = ("local", "peer", "cloud")
BETA: Final = 0.2  # of Fig. 5
Values = NDArray[np.float64]


def paper_loss(u: Values, tau: float, beta: float, *, gamma: float, lam: float) -> Values:
    """The loss (4) of one token by its doubt, shape (n,). Its derivative in tau is `thresholds.paper_gradient`."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * gamma * (u - tau))) * ((1.0 - beta) ** 2 + lam))


def by_round(run: RunRecord, rounds: int) -> dict[str, list[float]]:
    """Transmission rate, mean doubt, mean beta of what was sent, and accuracy, by round."""
    found: dict[str, list[float]] = {"transmission rate": [], "mean u": [], "mean beta": [], "accuracy": []}
    for number in range(rounds):
        made = in_round(run, number)
        betas = [one.beta for one in made if one.beta is not None]
        found["transmission rate"].append(share(made, lambda one: SOURCES[one.source].verified))
        found["mean u"].append(float(np.mean([one.doubt for one in made])))
        found["mean beta"].append(float(np.mean(betas)) if betas else 0.0)
        found["accuracy"].append(share(made, lambda one: one.right))
    return found


def result_of(seeds: Sequence[FedhlmRuns]) -> LabResult:
    """Everything that is reported, over the runs of all seeds."""
    joined = over_seeds([_result(runs) for runs in seeds])
    reruns = reruns_table(row for runs in seeds for row in runs.reruns)
    tables = [*joined.tables, _clients(seeds[0]), reruns]
    return joined._replace(sentences=sentences(seeds), tables=tables)


def _result(runs: FedhlmRuns) -> LabResult:
    """What one seed shows."""
    experiment = runs.experiment
    facts = {
        "source": runs.source,
        "requests": experiment.requests,
        "articles": experiment.articles,
        "clients": experiment.clients,
        "clusters": experiment.clusters,
        "rounds": experiment.rounds,
        "seeds": experiment.seeds,
        "seed": experiment.seed,
    }
    tables = [_routing(runs), _baselines(runs), _accuracy(runs)]
    charts = [*_fig4(runs), _fig5(runs), *_fig7(runs), _fig8(runs), _fig9(runs), _fig10(runs)]
    compared = [PaperRow(value, *ours(runs, value)) for value in experiment.paper]
    return LabResult("fedhlm", experiment.title, facts, [], compared, tables, charts)


def ours(runs: FedhlmRuns, paper: PaperValue) -> tuple[float | None, float | None]:
    """Our value of a quantity of the paper, under the published and under the calibrated rules."""
    first = runs.experiment.alphas[0]
    published, calibrated = (runs.rounds[first, rules] for rules in (PUBLISHED, CALIBRATED))
    match paper.place, paper.name.split(", "):
        case "Fig. 4", _:
            return published.thresholds[-1], in_round(calibrated, -1)[-1].tau
        case "Fig. 5", _:
            return float(paper_loss(np.ones(1), 0.3, BETA, gamma=10.0, lam=0.01)[0]), None
        case "Table III", [layer]:
            name = "peer" if layer == "peers" else layer
            return _whole(published)[name], _whole(calibrated)[name]
        case "Fig. 7", [layer, alpha]:
            return _skewed(runs, layer, float(alpha.removeprefix("alpha ")))
        case "Table IV", ["FedHLM", _]:
            return _whole(published)["cloud"], _whole(calibrated)["cloud"]
        case "Table IV", [name, _]:
            return settled(runs.baselines[name])["cloud"], None
        case "Table V", [name]:
            ratios = [ratio for _, ratio in _hits(runs)]
            return (min(ratios) if name.startswith("least") else max(ratios)) if ratios else None, None
        case "Fig. 9", _:
            return _correlation(_hits(runs)), None
        case "Table VI", ["centralised", _]:
            return share(in_round(runs.rounds[first, CENTRAL], -1), lambda one: one.right), None
        case "Table VI", [name]:
            number = 0 if "first" in name else -1
            return tuple(share(in_round(r, number), lambda one: one.right) for r in (published, calibrated))  # type: ignore[return-value]
        case "Fig. 10", [name]:
            key_name = "SLM alone" if name == "SLM alone" else "speculative"
            return share(runs.baselines[key_name], lambda one: one.right), None
    raise ValueError(f"a value of the paper must be one that is computed (got {paper.place}, {paper.name})")


def _skewed(runs: FedhlmRuns, layer: str, alpha: float) -> tuple[float | None, float | None]:
    """The share of a layer where clients differ so much; nothing if the experiment has no such clients."""
    if alpha not in runs.experiment.alphas:
        return None, None
    return _whole(runs.rounds[alpha, PUBLISHED])[layer], _whole(runs.rounds[alpha, CALIBRATED])[layer]


def sentences(seeds: Sequence[FedhlmRuns]) -> list[str]:
    """What the figures mean."""
    e = seeds[0].experiment

    def over(of: Callable[[FedhlmRuns], float]) -> SeedMean:
        return mean_of([of(runs) for runs in seeds])

    def whole(rules: str, holds: Callable[[LabOutcome], bool]) -> SeedMean:
        return over(lambda runs: share([o.made for o in runs.rounds[e.alphas[0], rules].outcomes], holds))

    guarded = over(lambda runs: runs.rounds[e.alphas[0], PUBLISHED].thresholds[-1] or 0.0)
    letter = over(lambda runs: runs.verbatim[-1])
    start = seeds[0].rounds[e.alphas[0], PUBLISHED].outcomes[0].made.tau
    reruns = [row for runs in seeds for row in runs.reruns]
    return [
        (
            f"Means over {e.seeds} seeds with intervals of {CONFIDENCE:.0%}. A seed deals the topics out to clients, orders "
            "the articles, and is that of every request's noise. The articles are the same under all seeds, so the "
            "intervals do not say what other articles would change, and what no seed changes has none."
        ),
        f"Every request is one greedy token: the topic of an article ({seeds[0].source}). The LLM alone names {over(lambda runs: runs.llm_right).percent} of them.",
        f"The published threshold starts at {start:g} and only rises: {guarded.full} after the last round with the live guards, {letter.full} by equations (5) to (8) to the letter, on all drafts.",
        f"Tokens equal to the LLM's: {whole(PUBLISHED, lambda one: one.agrees).percent} under the published rules, {whole(CALIBRATED, lambda one: one.agrees).percent} under the calibrated ones, whose budget is {e.budget:g}. The calibrated rules have the LLM score {whole(CALIBRATED, lambda one: one.audited).percent} of the tokens more, as audits.",
        "Rand-HLM and U-HLM decide on each token by itself, so how topics are dealt out to clients cannot change what they send; where the paper shows it changing (Fig. 8), something else changed too.",
        f"{sum(row.same for row in reruns)} of {sum(row.requests for row in reruns)} requests that ran again in the simulator, with real agents, edges and cloud, had the same token from the same source.",
    ]


def _whole(run: RunRecord) -> dict[str, float]:
    return settled([o.made for o in run.outcomes])


def _routing(runs: FedhlmRuns) -> LabTable:
    rows: list[tuple[str | float, ...]] = []
    for (alpha, rules), run in runs.rounds.items():
        whole, last = _whole(run), settled(in_round(run, -1))
        rows.append((alpha, rules, *(whole[x] for x in LAYERS), *(last[x] for x in LAYERS)))
    columns = ("alpha", "rules", "local", "peers", "cloud", "local, last round", "peers, last", "cloud, last")
    return LabTable("routing", "Who settles a token (Table III, Figs. 6 and 7)", columns, rows)


def _baselines(runs: FedhlmRuns) -> LabTable:
    def row(name: str, made: Sequence[LabOutcome]) -> tuple[str | float, ...]:
        counts = [sum(one.source == layer for one in made) for layer in LAYERS]
        return (name, *counts, len(made), share(made, lambda one: one.right), share(made, lambda one: one.agrees))

    first = runs.experiment.alphas[0]
    rows = [row(name, runs.baselines[name]) for name in BASELINES]
    rows += [
        row(f"FedHLM, {rules}", [o.made for o in runs.rounds[first, rules].outcomes])
        for rules in (PUBLISHED, CALIBRATED)
    ]
    columns = ("policy", "local", "peers", "cloud", "tokens", "topic right", "as the LLM")
    return LabTable("baselines", "Tokens by policy (Table IV)", columns, rows)


def _clients(runs: FedhlmRuns) -> LabTable:
    run, rows = runs.rounds[_middle(runs), PUBLISHED], []
    for client in range(runs.experiment.clients):
        made = of_client(run, client)
        if made:
            sent = sum(SOURCES[one.source].verified for one in made)
            rows.append(
                (client + 1, hit_ratio(made), share(made, lambda one: one.right), sent, len(made), entropy_of(made))
            )
    columns = ("client", "hit ratio of lookups", "topic right", "tokens of the LLM", "tokens", "entropy of its tokens")
    title = f"Clients under the published rules (Table V), alpha {_middle(runs):g}, seed {runs.experiment.seed}"
    return LabTable("clients", title, columns, rows)


def _middle(runs: FedhlmRuns) -> float:
    alphas = runs.experiment.alphas
    return alphas[len(alphas) // 2]


def _hits(runs: FedhlmRuns) -> list[tuple[float, float]]:
    """Entropy and hit ratio of each client that asked its peers."""
    run = runs.rounds[_middle(runs), PUBLISHED]
    made = [of_client(run, client) for client in range(runs.experiment.clients)]
    ratios = [(entropy_of(one), hit_ratio(one)) for one in made]
    return [(entropy, ratio) for entropy, ratio in ratios if ratio is not None]


def _correlation(points: Sequence[tuple[float, float]]) -> float | None:
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 0.0 and y.std() > 0.0 else None


def _accuracy(runs: FedhlmRuns) -> LabTable:
    first, rounds = runs.experiment.alphas[0], runs.experiment.rounds
    shown = sorted({0, *(n - 1 for n in (5, 10, 15, 20, 25) if n < rounds), rounds - 1})
    rows = []
    for number in shown:
        right = [
            share(in_round(runs.rounds[first, r], number), lambda one: one.right)
            for r in (PUBLISHED, CALIBRATED, CENTRAL)
        ]
        rows.append((number + 1, *right))
    note = f"LLM alone {runs.llm_right:.4f}; " + ", ".join(
        f"{name} {share(runs.baselines[name], lambda one: one.right):.4f}" for name in ("speculative", "SLM alone")
    )
    return LabTable(
        "accuracy", "Topics right by round (Table VI)", ("round", PUBLISHED, CALIBRATED, CENTRAL), rows, note
    )


def _numbers(runs: FedhlmRuns) -> list[float]:
    return [float(n + 1) for n in range(runs.experiment.rounds)]


def _fig4(runs: FedhlmRuns) -> list[LabChart]:
    first, x = runs.experiment.alphas[0], _numbers(runs)
    published, calibrated = (runs.rounds[first, rules] for rules in (PUBLISHED, CALIBRATED))
    taus = [float(np.mean([max(0.0, one.tau) for one in in_round(calibrated, n)])) for n in range(len(x))]
    lines = [
        ChartSeries("published, live guards", x, [0.0 if t is None else t for t in published.thresholds]),
        ChartSeries("published, to the letter", x, runs.verbatim),
        ChartSeries("calibrated, mean of clients (0: all is sent)", x, taus),
    ]
    metrics = by_round(published, len(x))
    rest = [ChartSeries(name, x, metrics[name]) for name in ("transmission rate", "mean u", "mean beta")]
    return [
        LabChart("fig-4a", "Threshold by round (Fig. 4 a)", "round", "threshold", "line", lines, {"paper: 0.53": 0.53}),
        LabChart("fig-4b", "Published rules by round (Fig. 4 b)", "round", "share", "line", rest),
    ]


def _fig5(runs: FedhlmRuns) -> LabChart:
    u = np.linspace(0.0, 1.0, 101)
    lines = [
        ChartSeries(f"tau {tau}", u.tolist(), paper_loss(u, tau, BETA, gamma=10.0, lam=0.01).tolist())
        for tau in (0.3, 0.5, 0.7)
    ]
    return LabChart("fig-5", "Loss (4) at beta 0.2 (Fig. 5)", "u", "loss", "line", lines, {"paper: 0.65": 0.65})


def _fig7(runs: FedhlmRuns) -> list[LabChart]:
    names = [f"alpha {alpha:g}" for alpha in runs.experiment.alphas]
    charts = []
    for rules in (PUBLISHED, CALIBRATED):
        shares = [_whole(runs.rounds[alpha, rules]) for alpha in runs.experiment.alphas]
        stack = [ChartSeries(layer, names, [s[layer] for s in shares]) for layer in LAYERS]
        charts.append(
            LabChart(f"fig-7-{rules}", f"Who settles a token, {rules} rules (Figs. 6, 7)", "", "share", "stack", stack)
        )
    return charts


def _fig8(runs: FedhlmRuns) -> LabChart:
    first = runs.experiment.alphas[0]
    shares = {name: settled(runs.baselines[name]) for name in ("Rand-HLM", "U-HLM")}
    shares |= {f"FedHLM,\n{rules}": _whole(runs.rounds[first, rules]) for rules in (PUBLISHED, CALIBRATED)}
    stack = [ChartSeries(layer, list(shares), [s[layer] for s in shares.values()]) for layer in LAYERS]
    return LabChart("fig-8", f"Tokens by policy, alpha {first:g} (Table IV, Fig. 8)", "", "share", "stack", stack)


def _fig9(runs: FedhlmRuns) -> LabChart:
    points = _hits(runs)
    series = ChartSeries("clients", [p[0] for p in points], [p[1] for p in points])
    title = f"Hit ratio against entropy of tokens, alpha {_middle(runs):g} (Fig. 9)"
    return LabChart("fig-9", title, "entropy of a client's tokens, of ln 4", "hit ratio", "points", [series])


def _fig10(runs: FedhlmRuns) -> LabChart:
    first, x = runs.experiment.alphas[0], _numbers(runs)
    lines = [
        ChartSeries(rules, x, by_round(runs.rounds[first, rules], len(x))["accuracy"])
        for rules in (PUBLISHED, CALIBRATED, CENTRAL)
    ]
    levels = {"LLM alone, speculative": runs.llm_right}
    levels["SLM alone"] = share(runs.baselines["SLM alone"], lambda one: one.right)
    return LabChart("fig-10", "Topics right by round (Fig. 10)", "round", "share right", "line", lines, levels)
