"""Tables, pictures and sentences of the experiment with agents per verifier."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from fedhlm.config import load
from fedhlm_lab.papers.capacity import LEARNERS, MIXED, CapacityPoint, CapacityRuns
from fedhlm_lab.papers.desk import learns
from fedhlm_lab.papers.findings import Cell, ChartSeries, LabChart, LabPanels, LabResult, LabTable, PaperRow
from fedhlm_lab.papers.intervals import SeedMean, mean_of

OURS: Final = ("exact", "budget")


def capacity_of(agents: Sequence[int], speeds: Sequence[float], target: float) -> float:
    """How many agents have `target` tokens a second, on lines through the points over log(agents).

    0 if one agent alone has less. If the largest fleet has more, its size: more would be a guess.
    """
    if speeds[0] < target:
        return 0.0
    found = float(agents[0])
    for left, right, fast, slow in zip(agents, agents[1:], speeds, speeds[1:], strict=False):
        if slow < target:
            share = (fast - target) / (fast - slow)
            return math.exp(math.log(left) + share * (math.log(right) - math.log(left)))
        found = float(right)
    return found


class CapacityFindings:
    """The means of all points."""

    def __init__(self, runs: CapacityRuns) -> None:
        self.runs = runs
        self.verifiers = list(runs.experiment.verifiers)
        self.presets = [*runs.experiment.presets, *([MIXED] if runs.experiment.mixed else [])]
        self.agents = sorted(set(runs.experiment.agents))

    def points(self, verifier: str, preset: str, agents: int) -> list[CapacityPoint]:
        """The points of all seeds."""
        return [p for p in self.runs.points if (p.verifier, p.preset, p.agents) == (verifier, preset, agents)]

    def speed(self, verifier: str, preset: str, agents: int) -> SeedMean:
        """Tokens a second and agent."""
        return mean_of([point.speed for point in self.points(verifier, preset, agents)])

    def capacity(self, verifier: str, preset: str, target: float) -> SeedMean:
        """Agents at a speed, over the seeds."""
        found = []
        for seed in sorted({point.seed for point in self.runs.points}):
            mine = {p.agents: p.speed for n in self.agents for p in self.points(verifier, preset, n) if p.seed == seed}
            found.append(capacity_of(self.agents, [mine[n] for n in self.agents], target))
        return mean_of(found)

    def beside(self, verifier: str, preset: str, target: float) -> str | None:
        """The ratio as text; where ours is the largest fleet, it is at least that."""
        ratio = self.ratio(verifier, preset, target)
        least = self.capacity(verifier, preset, target).mean >= self.agents[-1]
        return None if ratio is None else f"{'at least ' if least else ''}{ratio:.2f}"

    def ratio(self, verifier: str, preset: str, target: float) -> float | None:
        """Capacity beside the baseline's; None where one has none, or the baseline's is the largest fleet."""
        ours, base = (self.capacity(verifier, name, target).mean for name in (preset, self.runs.experiment.baseline))
        return ours / base if ours and base and base < self.agents[-1] else None


def result_of(runs: CapacityRuns) -> LabResult:
    """Everything that the report shows."""
    found, e = CapacityFindings(runs), runs.experiment
    facts = {
        "source": runs.source, "seeds": e.seeds, "link": e.link, "texts of an agent": e.texts, "tokens": e.tokens,
        "agents": ", ".join(map(str, found.agents)),
    }  # fmt: skip
    ratios = [
        ratio
        for verifier in found.verifiers
        for preset in OURS
        for target in e.targets
        if preset in found.presets and (ratio := found.ratio(verifier, preset, target)) is not None
    ]
    compared = [PaperRow(paper, max(ratios, default=None)) for paper in e.paper]
    tables = [*(_capacities(found, verifier) for verifier in found.verifiers), _points(found), _costs(runs)]
    return LabResult("capacity", e.title, facts, _sentences(found), compared, tables, [_picture(found)])


def _sentences(found: CapacityFindings) -> list[str]:
    e, lines = found.runs.experiment, []
    for verifier in found.verifiers:
        parts = []
        for preset in found.presets:
            if preset == e.baseline:
                continue
            known = [(t, r) for t in e.targets if (r := found.beside(verifier, preset, t)) is not None]
            words = ", ".join(f"{ratio} times at {target:g} tokens/s" for target, ratio in known)
            parts.append(f"`{preset}` {words or 'unknown, as the largest fleet is not too many for either'}")
        lines.append(f"Verifier `{verifier}`, agents beside `{e.baseline}`: {'; '.join(parts)}.")
    if any(learns(load(preset=preset, environ={}).config.generation) for preset in (*e.presets, *e.mixed)):
        lines.append(f"Fleets that learn begin with what {LEARNERS} agents have learnt from {e.warm} texts.")
    if e.mixed:
        names = ", ".join(f"`{name}`" for name in e.mixed)
        lines.append(f"In `{MIXED}`, agents take {names} in turn; one of four has prompts of at least {e.long} tokens.")
    largest = found.agents[-1]
    for verifier in found.verifiers:
        work = {p: _work(found.points(verifier, p, largest)) for p in found.presets}
        words = "; ".join(f"`{preset}` {calls:.2f} and {positions:.2f}" for preset, (calls, positions) in work.items())
        lines.append(
            f"Calls of the LLM and tokens that it computes, for a token of {largest} agents on `{verifier}`: {words}."
        )
    return lines


def _work(points: Sequence[CapacityPoint]) -> tuple[float, float]:
    tokens = sum(point.tokens for point in points)
    return sum(p.calls for p in points) / tokens, sum(p.positions for p in points) / tokens


def _capacities(found: CapacityFindings, verifier: str) -> LabTable:
    e, rows = found.runs.experiment, []
    for preset in found.presets:
        row: list[str | float | None] = [f"`{preset}`"]
        for target in e.targets:
            row += [str(found.capacity(verifier, preset, target)), found.beside(verifier, preset, target)]
        rows.append(row)
    columns = ["preset"]
    for target in e.targets:
        columns += [f"agents at {target:g} tokens/s", f"beside {e.baseline}"]
    chosen = e.verifiers[verifier]
    note = (
        f"Batches of at most {chosen.batch_tokens} tokens; beyond the smallest call, work costs 1/{chosen.cheaper:g} of "
        f"what was measured. {_order_of(chosen.text_tokens_s)} {found.agents[-1]} agents is the largest fleet, and stands for that many or more."
    )
    return LabTable(f"capacity-{verifier}", f"Capacity of the verifier {verifier}", columns, rows, note)


def _order_of(text_tokens_s: float) -> str:
    if not text_tokens_s:
        return "Whoever has used the model least goes first."
    return f"The earliest deadline goes first, at {text_tokens_s:g} tokens a second."


def _points(found: CapacityFindings) -> LabTable:
    rows: list[tuple[Cell, ...]] = []
    for verifier in found.verifiers:
        for preset in found.presets:
            for agents in found.agents:
                points = found.points(verifier, preset, agents)
                calls, positions = _work(points)
                busy = mean_of([point.busy_s / point.wall_s for point in points])
                slowest = mean_of([min(point.speeds) for point in points])
                waits = [1000.0 * float(np.quantile(point.waits, 0.95)) for point in points if point.waits]
                reached = [
                    float(np.mean([s >= target for p in points for s in p.speeds]))
                    for target in found.runs.experiment.targets
                ]
                speed = found.speed(verifier, preset, agents)
                rows.append(
                    (
                        verifier,
                        f"`{preset}`",
                        agents,
                        str(speed),
                        str(slowest),
                        *reached,
                        str(mean_of(waits)) if len(waits) > 1 else None,
                        calls,
                        positions,
                        str(busy),
                    )
                )
    columns = (
        "verifier", "preset", "agents", "tokens/s of an agent", "of the slowest",
        *(f"agents with {target:g} tokens/s" for target in found.runs.experiment.targets),
        "ms at the cloud, 95 %", "LLM calls a token",
        "LLM tokens a token", "share of time the LLM is busy",
    )  # fmt: skip
    return LabTable("points", "All fleets", columns, rows)


def _costs(runs: CapacityRuns) -> LabTable:
    rows = [(c.batch, c.width, c.context, 1000.0 * c.seconds) for c in runs.costs.calls]
    small = runs.costs.small
    note = (
        f"The SLM takes {1000.0 * small.call_s:.3g} ms a call and {1000.0 * small.token_s:.3g} ms for each token in it."
    )
    return LabTable(
        "costs", "Measured calls of the LLM", ("requests", "tokens of each", "cached before", "ms"), rows, note
    )


def _picture(found: CapacityFindings) -> LabPanels:
    panels = []
    for verifier in found.verifiers:
        series = [
            ChartSeries(preset, found.agents, [found.speed(verifier, preset, n).mean for n in found.agents])
            for preset in found.presets
        ]
        levels = {f"{target:g} tokens/s": target for target in found.runs.experiment.targets}
        panels.append(
            LabChart(
                verifier,
                f"verifier {verifier}",
                "agents",
                "tokens/s of an agent",
                "line",
                series,
                levels,
                log_x=True,
                log_y=True,
            )
        )
    return LabPanels("fig-capacity", "Speed of an agent against the number of agents", panels)
