"""Tables, pictures and sentences of the experiment with all presets on all links."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from fedhlm.choices import GATES
from fedhlm.config import load
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm_lab.papers.experiment import ParetoExperiment
from fedhlm_lab.papers.findings import ChartSeries, LabChart, LabPanels, LabResult, LabTable
from fedhlm_lab.papers.intervals import CONFIDENCE, SeedMean, mean_of
from fedhlm_lab.papers.pareto import ALONE_S, ParetoRuns
from fedhlm_lab.papers.quantities import (
    AGREES,
    CALLS,
    DOWN,
    FIRST,
    KEPT,
    POSITIONS,
    SAME,
    SENT,
    SPEED,
    UP,
    Quantity,
)
from fedhlm_lab.sim import links

RIVAL: Final = "colocated"
COMPARED: Final = (RIVAL, "llm-only", "exact", "budget")
SHOWN: Final = "lte"  # the link of the picture with all quantities
HARDLY: Final = 0.001  # tokens that may differ where the text is still called the LLM's: float ties between batches


COSTS: Final = (SENT, UP, DOWN, SPEED, CALLS, POSITIONS)
WIDE: Final = (UP, DOWN, SPEED)  # quantities of many magnitudes
REST: Final = (FIRST, SAME, KEPT)
JUDGED: Final = (AGREES, SPEED, SENT)  # a preset is on the frontier if none is at least as good in all three


class Findings:
    """The means of every quantity, by link and preset."""

    def __init__(self, runs: ParetoRuns) -> None:
        self.runs = runs
        self.presets = list(dict.fromkeys(point.preset for point in runs.points))
        self.links = [name for name in links.names() if any(point.link == name for point in runs.points)]
        self._points = {
            (link, preset): [p for p in runs.points if (p.link, p.preset) == (link, preset)]
            for link in self.links
            for preset in self.presets
        }

    def mean(self, quantity: Quantity, link: str, preset: str) -> SeedMean:
        """A quantity of a preset on a link."""
        return mean_of([quantity.of(point.written) for point in self._points[link, preset]])

    def over_links(self, quantity: Quantity, preset: str) -> float:
        """A quantity of a preset, as the mean over links."""
        return float(np.mean([self.mean(quantity, link, preset).mean for link in self.links]))

    def frontier(self, link: str) -> list[str]:
        """The presets that no other one beats, or equals, in all of JUDGED."""

        def vector(preset: str) -> list[float]:
            means = [self.mean(quantity, link, preset).mean for quantity in JUDGED]
            return [mean if quantity.more else -mean for quantity, mean in zip(JUDGED, means, strict=True)]

        found = {preset: vector(preset) for preset in self.presets}
        return [
            preset
            for preset, own in found.items()
            if not any(
                other != own and all(b >= a for a, b in zip(own, other, strict=True)) for other in found.values()
            )
        ]

    def exact(self, link: str) -> list[str]:
        """The presets whose text on a link is the LLM's own, the fastest first."""
        own = [p for p in self.presets if self.mean(AGREES, link, p).mean >= 1.0 - HARDLY]
        return sorted(own, key=lambda preset: -self.mean(SPEED, link, preset).mean)


def result_of(runs: ParetoRuns) -> LabResult:
    """Everything that is written about the runs."""
    found, e = Findings(runs), runs.experiment
    facts = {
        "source": runs.source,
        "seeds": e.seeds,
        "agents": e.agents,
        "texts for each preset, link and seed": e.texts,
        "tokens a text, at most": e.tokens,
        "texts to learn from": e.warm,
        "temperature": 0.0,
        "seconds of a call and of a token in it, SLM on the device": _pair(e.device_s),
        "the same, SLM at the cloud": _pair(e.beside_s),
        "the same, LLM": _pair(e.large_s),
        "seed": e.seed,
    }
    return LabResult(
        "pareto",
        e.title,
        facts,
        [*_words(e), *_where_it_wins(found), *_what_it_cannot(found)],
        [],
        [*(_table(found, link) for link in found.links), _alone(found), _certified(found)],
        [_links(found), _quantities(found)],
    )


def _pair(seconds: tuple[float, float]) -> str:
    return f"{seconds[0]:g}, {seconds[1]:g}"


def _words(e: ParetoExperiment) -> list[str]:
    return [
        (
            f"Means over {e.seeds} seeds with intervals of {CONFIDENCE:.0%}. Texts are greedy, so that couplings with other "
            "random numbers can be compared. A token counts as the LLM's if the LLM would have emitted it after the same "
            "text, so that one wrong token is one and not all that follow. Bytes are those of the agents' links, with "
            "everything that learning, peers and audits send. Nothing is given up for being late."
        ),
    ]


def _where_it_wins(found: Findings) -> list[str]:
    fastest = [link for link in found.links if found.exact(link)[:1] == [RIVAL]]
    lines = []
    for link in found.links:
        order = found.exact(link)[:3]
        speeds = [f"`{preset}` {found.mean(SPEED, link, preset).mean:.3g}" for preset in order]
        lines.append(f"{link}: {', '.join(speeds)}")
    calls = {preset: found.over_links(CALLS, preset) for preset in COMPARED if preset in found.presets}
    speeds_told = f"Tokens a second of the three fastest whose text is the LLM's own: {'; '.join(lines)}."
    counted = ", ".join(f"`{preset}` {count:.3f}" for preset, count in calls.items())
    calls_told = [f"Calls of the LLM a token: {counted}."] if calls else []
    if RIVAL not in found.presets:
        return [speeds_told, *calls_told]
    shared = [link for link in found.links if RIVAL in found.frontier(link)]
    return [
        f"Of the presets whose text is the LLM's own, `{RIVAL}` is the fastest on {_listed(fastest)}. {speeds_told}",
        f"No preset is at least as good as `{RIVAL}` in agreement, speed and messages together on {_listed(shared)}.",
        *calls_told,
    ]


def _what_it_cannot(found: Findings) -> list[str]:
    firsts = {preset: _alone_s(found, preset) for preset in found.presets}
    quickest = min(firsts, key=lambda preset: firsts[preset].mean)
    limits = sorted({preset for preset, _ in found.runs.certified})
    kept = [
        f"`{preset}` keeps {found.over_links(KEPT, preset):.1%} of the tokens on the device, and its certificate says "
        f"that at most {mean_of(_limits(found, preset)).mean:.3f} of a token's law is wrong, over all texts with those "
        "to learn from"
        for preset in limits
    ]
    if RIVAL not in found.presets:
        return [f"{told}." for told in kept]
    sooner = f", and after {firsts[quickest]} s under `{quickest}`" if quickest != RIVAL else ""
    return [
        (
            f"Without a link the first token comes after {firsts[RIVAL]} s under `{RIVAL}`{sooner}. "
            "All of these are written by the model of the device, which a device that leaves both "
            "models to the cloud does not have: it writes nothing."
        ),
        f"`{RIVAL}` sends every text to the cloud and has nothing to certify. {'; '.join(kept) or 'No preset kept any'}.",
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no link"


def _alone_s(found: Findings, preset: str) -> SeedMean:
    return mean_of([point.first_s for point in found.runs.alone if point.preset == preset])


def _limits(found: Findings, preset: str) -> list[float]:
    return [limit for (name, _), limit in found.runs.certified.items() if name == preset]


def _table(found: Findings, link: str) -> LabTable:
    quantities = (AGREES, *COSTS, *REST)
    frontier = found.frontier(link)
    rows = [
        (f"`{p}`", *(str(found.mean(q, link, p)) for q in quantities), "yes" if p in frontier else "-")
        for p in found.presets
    ]
    columns = ("preset", *(quantity.name for quantity in quantities), "frontier")
    note = "Frontier: no other preset is at least as good in agreement, speed and messages up."
    return LabTable(f"link-{link}", f"On {link}", columns, rows, note)


def _alone(found: Findings) -> LabTable:
    rows = []
    for preset in found.presets:
        points = [point for point in found.runs.alone if point.preset == preset]
        tokens, wanted = sum(point.tokens for point in points), sum(point.wanted for point in points)
        rows.append((f"`{preset}`", tokens, wanted, str(_alone_s(found, preset))))
    columns = ("preset", "tokens", "wanted", "seconds to the first token")
    note = "The device's own model writes them. They are unverified, unless the preset would have kept them anyway."
    return LabTable("without-a-link", f"Without a link, within {ALONE_S:.0f} s", columns, rows, note)


def _certified(found: Findings) -> LabTable:
    rows = []
    for preset in found.presets:
        config = load(preset=preset, environ={}).config.generation
        limits = _limits(found, preset)
        limit = str(mean_of(limits)) if len(limits) > 1 else "none"
        shared = "the LLM's own" if COUPLINGS[config.coupling].shared and GATES[config.gate].verifies_all else "-"
        kept = found.over_links(KEPT, preset)
        rows.append((f"`{preset}`", f"{kept:.3g}", limit, shared))
    columns = ("preset", "kept on the device", "limit of its certificate", "text, whatever the temperature")
    return LabTable("certified", "What is skipped, and who answers for it", columns, rows)


def _series(found: Findings, link: str, x: Quantity, y: Quantity) -> list[ChartSeries]:
    series = []
    for preset in found.presets:
        across, up = found.mean(x, link, preset), found.mean(y, link, preset)
        series.append(ChartSeries(preset, [across.mean], [up.mean], (across.half, up.half)))
    return series


def _agreements(found: Findings) -> tuple[float, float]:
    """The range of all agreements, so that pictures can be compared."""
    lowest = min(found.mean(AGREES, link, preset).mean for link in found.links for preset in found.presets)
    return lowest - 0.1 * (1.0 - lowest) - 0.005, 1.0 + 0.05 * (1.0 - lowest) + 0.002


def _links(found: Findings) -> LabPanels:
    panels = [
        LabChart(
            link, link, SPEED.name, AGREES.name, "points", _series(found, link, SPEED, AGREES),
            log_x=True, y_range=_agreements(found),
        )
        for link in found.links
    ]  # fmt: skip
    return LabPanels("fig-links", "Agreement against speed, link by link", panels)


def _quantities(found: Findings) -> LabPanels:
    link = SHOWN if SHOWN in found.links else found.links[0]
    panels = [
        LabChart(
            quantity.name.replace(" ", "-"), "", quantity.name, AGREES.name, "points",
            _series(found, link, quantity, AGREES), log_x=quantity in WIDE, y_range=_agreements(found),
        )
        for quantity in COSTS
    ]  # fmt: skip
    return LabPanels("fig-quantities", f"Agreement against what it costs, on {link}", panels)
