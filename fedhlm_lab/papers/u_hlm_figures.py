"""What U-HLM's runs show: tables, charts, and the papers' values beside ours. Pure functions of the runs.

Each figure follows from the runs of one seed, and is then joined over all seeds.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fedhlm_lab.papers.experiment import PaperValue
from fedhlm_lab.papers.findings import ChartSeries, LabChart, LabResult, LabTable, PaperRow
from fedhlm_lab.papers.intervals import CONFIDENCE, mean_of
from fedhlm_lab.papers.over_seeds import over_seeds
from fedhlm_lab.papers.rerun import reruns_table
from fedhlm_lab.papers.u_hlm import DOUBTS, PRONE, SpeedupPoint, UhlmRuns, rate_of, snr_of, token_s


def result_of(seeds: Sequence[UhlmRuns]) -> LabResult:
    """Everything that is reported, over the runs of all seeds."""
    joined = over_seeds([_result(runs) for runs in seeds])
    reruns = reruns_table(row for runs in seeds for row in runs.reruns)
    return joined._replace(sentences=sentences(seeds), tables=[*joined.tables, reruns])


def _result(runs: UhlmRuns) -> LabResult:
    """What one seed shows."""
    experiment = runs.experiment
    facts = {
        "source": runs.source,
        "texts": experiment.articles,
        "tokens": len(runs.seen[DOUBTS[0]]),
        "questions": experiment.questions,
        "temperature": experiment.temperature,
        "bandwidth, Hz": experiment.bandwidth_hz,
        "seconds of the SLM and the LLM a token": f"{experiment.slm_s:g}, {experiment.llm_s:g}",
        "seeds": experiment.seeds,
        "seed": experiment.seed,
    }
    tables = [_fits(runs), _thresholds(runs), _sizes(runs), _speedups(runs)]
    charts = [_doubt(runs), _rates(runs), _throughput(runs), _vocabulary(runs), _speedup_chart(runs)]
    compared = [PaperRow(value, *ours(runs, value)) for value in experiment.paper]
    return LabResult("u-hlm", experiment.title, facts, [], compared, tables, charts)


def points_of(runs: UhlmRuns) -> dict[str, SpeedupPoint]:
    """Operating points in the link model: the paper's numbers in two ways, and ours at the published threshold."""
    e = runs.experiment
    rate, times = runs.rate(PRONE), (e.slm_s, e.llm_s)
    squeezed = (1.0 - e.paper_compression) * e.paper_law_bytes
    return {
        "CU-HLM, 30 tokens": SpeedupPoint(e.paper_law_bytes, e.paper_top_bytes, e.paper_rate, *times),
        "CU-HLM, 97.4 % compression": SpeedupPoint(e.paper_law_bytes, squeezed, e.paper_rate, *times),
        "ours, U-HLM": SpeedupPoint(runs.law_bytes["full"], runs.law_bytes["full"], rate, *times),
        "ours, CU-HLM": SpeedupPoint(runs.law_bytes["full"], runs.law_bytes["published-cu"], rate, *times),
    }


def ours(runs: UhlmRuns, paper: PaperValue) -> tuple[float | None, float | None]:
    """Our value of a quantity, under the published rules and under the calibrated threshold."""
    fit, points = runs.fits[DOUBTS[0]], points_of(runs)
    tau = runs.fits[DOUBTS[1]].calibrated
    calibrated = runs.rate(tau, DOUBTS[1])
    slowest = rate_of(min(runs.experiment.snr_db), runs.experiment.bandwidth_hz)
    match paper.place, paper.name.split(",")[0]:
        case _, "slope of beta against u":
            return fit.a, None
        case _, "intercept":
            return fit.b, None
        case _, "risk-averse threshold":
            return fit.averse, None
        case _, "risk-prone threshold":
            return fit.prone, tau
        case _, "transmission rate":
            return runs.rate(PRONE), calibrated
        case _, "accuracy":
            return runs.accuracy[PRONE][0] / runs.llm_right, None
        case "U-HLM", "throughput":
            return points["ours, U-HLM"].at(slowest), points["ours, U-HLM"]._replace(sent=calibrated).at(slowest)
        case _, "share of transmissions skipped":
            return 1.0 - runs.rate(PRONE), 1.0 - calibrated
        case _, "compression of the law":
            return 1.0 - runs.law_bytes["published-cu"] / runs.law_bytes["full"], None
        case "CU-HLM", "throughput":
            return points["ours, CU-HLM"].at(slowest), points["ours, CU-HLM"]._replace(sent=calibrated).at(slowest)
    raise ValueError(f"a value of the paper must be one that is computed (got {paper.place}, {paper.name})")


def sentences(seeds: Sequence[UhlmRuns]) -> list[str]:
    """What the figures mean."""
    first = seeds[0]
    e, papers = first.experiment, points_of(first)

    def over(of: Callable[[UhlmRuns], float]) -> str:
        return mean_of([of(runs) for runs in seeds]).full

    def calibrated(runs: UhlmRuns) -> float:
        return runs.fits[DOUBTS[1]].calibrated

    rate = papers["CU-HLM, 30 tokens"].rate_for(e.paper_speedup)
    at = "at no rate"
    if rate is not None:
        at = f"at {8.0 * rate / 1000.0:,.0f} kbit/s, which is {snr_of(rate, e.bandwidth_hz):.1f} dB on {e.bandwidth_hz / 1e6:g} MHz"
    reruns = [row for runs in seeds for row in runs.reruns]
    return [
        (
            f"Means over {e.seeds} seeds with intervals of {CONFIDENCE:.0%}. A seed is that of the drafts and of the draws "
            "of every doubt. Texts and questions are the same under all seeds, so the intervals do not say what other "
            "texts would change, and what no seed changes has none."
        ),
        f"On {first.fits[DOUBTS[0]].tokens:,} tokens beta = a u + b has a = {over(lambda r: r.fits[DOUBTS[0]].a)} and b = {over(lambda r: r.fits[DOUBTS[0]].b)}, with a correlation of {over(lambda r: r.fits[DOUBTS[0]].correlation)}; U-HLM has 0.82 u - 0.06.",
        (
            f"At the published threshold {PRONE:g} a share of {over(lambda r: r.rate(PRONE))} is sent, and the kept tokens cost {over(lambda r: r.error(PRONE))} of total variation a token. "
            f"The calibrated threshold {over(calibrated)} sends {over(lambda r: r.rate(calibrated(r), DOUBTS[1]))} and costs {over(lambda r: r.error(calibrated(r), DOUBTS[1]))}; its budget is {e.budget:g}."
        ),
        (
            f"The {e.paper_speedup:g} times of CU-HLM need laws of 30 tokens ({e.paper_top_bytes:g} of {e.paper_law_bytes:,.0f} bytes, 99.9 % less) and hold {at}. "
            f"With 97.4 % compression no link gives more than {papers['CU-HLM, 97.4 % compression'].most:.1f} times."
        ),
        f"With our vocabulary of {first.law_bytes['full'] / 2.0:,.0f} a whole law has {first.law_bytes['full']:,.0f} bytes only, so CU-HLM gains at most {over(lambda r: points_of(r)['ours, CU-HLM'].most)} times.",
        "The link model has no round trip, no cost of a message and no downlink. Each of them makes the gain of fewer bytes smaller.",
        f"{sum(row.same for row in reruns)} of {sum(row.requests for row in reruns)} questions that ran again in the simulator, with real agents, edges and cloud, had the same token from the same source.",
    ]


def _fits(runs: UhlmRuns) -> LabTable:
    columns = ("u", "tokens", "correlation", "a", "b", "P(p < q)", "risk-averse", "risk-prone", "calibrated")
    return LabTable("fits", "beta = a u + b, and the thresholds that follow", columns, list(runs.fits.values()))


def _thresholds(runs: UhlmRuns) -> LabTable:
    rows = [
        (tau, runs.rate(tau), runs.error(tau), runs.accuracy[tau][1], runs.accuracy[tau][0], runs.llm_right)
        for tau in runs.experiment.taus
    ]
    columns = ("tau", "texts: sent", "texts: TV a token", "questions: sent", "questions: right", "LLM: right")
    return LabTable("thresholds", "Transmission rate and accuracy by threshold (U-HLM)", columns, rows)


def _sizes(runs: UhlmRuns) -> LabTable:
    rows = [
        (size, *(found[n] for n in ("full", "published-cu", "lattice", "gumbel"))) for size, found in runs.sizes.items()
    ]
    columns = ("vocabulary", "whole law, 16 bits", "CU-HLM, 30 tokens", "lattice, 30 tokens", "shared noise: the token")
    return LabTable("vocabulary", "Bytes of an uncertain token by vocabulary", columns, rows)


def _speedups(runs: UhlmRuns) -> LabTable:
    e, rows = runs.experiment, []
    for name, point in points_of(runs).items():
        rate = point.rate_for(e.paper_speedup)
        kbit, snr = (None, None) if rate is None else (8.0 * rate / 1000.0, snr_of(rate, e.bandwidth_hz))
        there = None if rate is None else point.at(rate)
        rows.append((name, point.whole_bytes, point.sent_bytes, point.sent, point.most, kbit, snr, there))
    columns = (
        "point",
        "bytes of HLM",
        "bytes",
        "sent",
        "limit",
        "206 times at kbit/s",
        "that is dB",
        "throughput there",
    )
    return LabTable("speedups", "Where 206 times HLM's throughput hold", columns, rows)


def _doubt(runs: UhlmRuns) -> LabChart:
    fit, seen = runs.fits[DOUBTS[0]], runs.seen[DOUBTS[0]]
    u, beta = np.array([one.doubt for one in seen]), np.array([one.beta for one in seen])
    levels = sorted(set(u.tolist()))
    means = [float(beta[u == level].mean()) for level in levels]
    x = np.linspace(0.0, 1.0, 21).tolist()  # the levels of u
    series = [
        ChartSeries("mean beta of tokens with this u", levels, means),
        ChartSeries("fit: a u + b", x, [max(0.0, fit.a * u + fit.b) for u in x]),
        ChartSeries("U-HLM: 0.82 u - 0.06", x, [max(0.0, 0.82 * u - 0.06) for u in x]),
    ]
    return LabChart(
        "fig-u-against-beta", "Doubt against rejection probability", "u, of 20 draws", "beta", "line", series
    )


def _rates(runs: UhlmRuns) -> LabChart:
    x = list(runs.experiment.taus)
    series = [
        ChartSeries("texts: share sent", x, [runs.rate(tau) for tau in x]),
        ChartSeries("texts: total variation a token", x, [runs.error(tau) for tau in x]),
        ChartSeries("questions: share sent", x, [runs.accuracy[tau][1] for tau in x]),
        ChartSeries("questions: share right", x, [runs.accuracy[tau][0] for tau in x]),
    ]
    return LabChart("fig-thresholds", "What a threshold costs (U-HLM)", "threshold", "share", "line", series)


def _throughput(runs: UhlmRuns) -> LabChart:
    e, x = runs.experiment, list(runs.experiment.snr_db)
    sent = runs.rate(PRONE)
    policies = {
        "HLM": (1.0, "full"),
        f"U-HLM, tau {PRONE:g}": (sent, "full"),
        f"CU-HLM, tau {PRONE:g}": (sent, "published-cu"),
    }
    series = []
    for name, (share, law) in policies.items():
        rates = [rate_of(snr, e.bandwidth_hz) for snr in x]
        seconds = [token_s(rate, share, runs.law_bytes[law], slm_s=e.slm_s, llm_s=e.llm_s) for rate in rates]
        series.append(ChartSeries(name, x, [1.0 / s for s in seconds]))
    title = f"Throughput on a link of {e.bandwidth_hz / 1e6:g} MHz"
    return LabChart("fig-throughput", title, "SNR, dB", "tokens a second", "line", series)


def _vocabulary(runs: UhlmRuns) -> LabChart:
    names = {
        "full": "whole law",
        "published-cu": "CU-HLM, 30 tokens",
        "lattice": "lattice, 30 tokens",
        "gumbel": "token alone",
    }
    x = [float(size) for size in runs.sizes]
    series = [ChartSeries(name, x, [float(s[key]) for s in runs.sizes.values()]) for key, name in names.items()]
    title = "Bytes of an uncertain token by vocabulary"
    return LabChart(
        "fig-vocabulary", title, "tokens in the vocabulary", "bytes", "line", series, log_x=True, log_y=True
    )


def _speedup_chart(runs: UhlmRuns) -> LabChart:
    kbit = np.geomspace(1.0, 1e6, 49).tolist()
    series = [ChartSeries(name, kbit, [p.at(1000.0 * k / 8.0) for k in kbit]) for name, p in points_of(runs).items()]
    levels = {"CU-HLM reports 206": runs.experiment.paper_speedup}
    title = "Throughput over HLM's by the rate of the link"
    return LabChart("fig-speedups", title, "kbit/s", "times HLM", "line", series, levels, log_x=True, log_y=True)
