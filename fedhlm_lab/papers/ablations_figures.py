"""Tables, pictures and sentences of the experiment with and without each part."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from fedhlm_lab.papers.ablations import AblationRuns, System, systems_of, workloads_of
from fedhlm_lab.papers.experiment import AblatedPart, AblationsExperiment
from fedhlm_lab.papers.findings import ChartSeries, LabChart, LabPanels, LabResult, LabTable
from fedhlm_lab.papers.intervals import CONFIDENCE, SeedMean, mean_of
from fedhlm_lab.papers.quantities import AGREES, BY_PEERS, CALLS, DOWN, KEPT, SENT, SPEED, UP, Quantity

QUANTITIES: Final = (AGREES, SENT, UP, DOWN, SPEED, KEPT, BY_PEERS, CALLS)
LIMIT: Final = "limit of the certificate"
ROUNDING: Final = 1e-9


class Worth(NamedTuple):
    """A figure with a part and without it, and the mean of the differences seed by seed (with less without).

    `more` says whether more is better. `place` is the link; empty where the figure is about all links.
    """

    name: str
    place: str
    with_it: SeedMean
    without: SeedMean
    gain: SeedMean
    more: bool

    @property
    def same(self) -> bool:
        """Whether no seed differs."""
        return abs(self.gain.mean) <= ROUNDING and self.gain.half <= ROUNDING

    @property
    def apart(self) -> bool:
        """Whether the interval of the difference is apart from 0."""
        return not self.same and abs(self.gain.mean) > self.gain.half

    @property
    def better(self) -> bool:
        """Whether the system is better with the part."""
        return (self.gain.mean > 0.0) == self.more

    def __str__(self) -> str:
        where = f" on {self.place}" if self.place else ""
        return f"{self.name}{where} {self.with_it.mean:.3g} instead of {self.without.mean:.3g} ({signed(self.gain)})"


def signed(found: SeedMean) -> str:
    """A difference with its sign."""
    return f"{'+' if found.mean > 0.0 else ''}{found}"


def worth_of(name: str, place: str, with_it: Mapping[int, float], without: Mapping[int, float], *, more: bool) -> Worth:
    """Compare two systems by their values, seed by seed."""
    gains = [with_it[seed] - without[seed] for seed in with_it]
    own, other = (mean_of(list(values.values())) for values in (with_it, without))
    return Worth(name, place, own, other, mean_of(gains), more)


class AblationFindings:
    """All figures of all systems, and what each part is worth."""

    def __init__(self, runs: AblationRuns) -> None:
        self.runs = runs
        self.links = list(runs.experiment.links)

    def values(self, quantity: Quantity, system: System, workload: str, link: str) -> dict[int, float]:
        """A figure of a system, by seed."""
        return {
            point.seed: quantity.of(point.written)
            for point in self.runs.points
            if (point.system, point.workload, point.link) == (system, workload, link)
        }

    def limits(self, system: System, workload: str) -> dict[int, float]:
        """The limits of the certificates of a system, by seed; empty without audits."""
        found = self.runs.certified.items()
        return {seed: limit for (name, asked, seed), limit in found if (name, asked) == (system, workload)}

    def worth(self, quantity: Quantity, part: AblatedPart, workload: str, link: str) -> Worth:
        """What a part is worth in one figure."""
        both = [self.values(quantity, system, workload, link) for system in systems_of(part)]
        return worth_of(quantity.name, link, both[0], both[1], more=quantity.more)

    def limit(self, part: AblatedPart, workload: str) -> Worth | None:
        """What a part is worth in the limit of the certificate; None if one of the systems has none."""
        both = [self.limits(system, workload) for system in systems_of(part)]
        return worth_of(LIMIT, "", both[0], both[1], more=False) if all(both) else None

    def all_of(self, part: AblatedPart, workload: str) -> list[Worth]:
        """What a part is worth in everything."""
        found = [self.worth(quantity, part, workload, link) for quantity in QUANTITIES for link in self.links]
        limit = self.limit(part, workload)
        return found if limit is None else [*found, limit]


def result_of(runs: AblationRuns) -> LabResult:
    """Everything that is written about the runs."""
    found, e = AblationFindings(runs), runs.experiment
    return LabResult(
        "ablations",
        e.title,
        _facts(runs),
        [_words(found), *(_sentence(found, part) for part in e.parts)],
        [],
        [table for name in e.workloads for table in (_differences(found, name), _systems(found, name))],
        [_picture(found, name) for name in e.workloads],
    )


def _facts(runs: AblationRuns) -> dict[str, str | int | float]:
    e = runs.experiment
    facts: dict[str, str | int | float] = {
        "seeds": e.seeds, "seed": e.seed, "agents": e.agents, "clusters": e.clusters, "links": ", ".join(e.links),
        "temperature": 0.0,
    }  # fmt: skip
    for name, wanted in e.workloads.items():
        facts[wanted.title] = (
            f"{runs.sources[name]}; {wanted.warm} texts to learn from, {wanted.texts} on each link, at most "
            f"{wanted.tokens} tokens each"
        )
    return facts


def _parts_on(e: AblationsExperiment, workload: str) -> list[AblatedPart]:
    return [part for part in e.parts if workload in workloads_of(part, e)]


def _words(found: AblationFindings) -> str:
    e = found.runs.experiment
    worths = [w for part in e.parts for name in workloads_of(part, e) for w in found.all_of(part, name) if not w.same]
    apart = sum(worth.apart for worth in worths)
    return (
        f"Each system has a part, and runs again without it, with the same {e.seeds} seeds and texts. A difference is the "
        f"mean over seeds of the figure with the part less the figure without it, with its interval of {CONFIDENCE:.0%}. "
        f"Of {len(worths)} differences that are not 0 in every seed, {apart} have an interval apart from 0; by chance alone "
        f"about {(1.0 - CONFIDENCE) * len(worths):.0f} would."
    )


def _sentence(found: AblationFindings, part: AblatedPart) -> str:
    """What a part is worth."""
    e, with_it = found.runs.experiment, systems_of(part)[0]
    lines = []
    for name in workloads_of(part, e):
        worths = found.all_of(part, name)
        apart = [worth for worth in worths if worth.apart]
        better, worse = ([str(w) for w in apart if w.better is wanted] for wanted in (True, False))
        says = [f"{word} are {', '.join(some)}" for word, some in (("better", better), ("worse", worse)) if some]
        nothing = (
            "every figure is the same without it" if all(w.same for w in worths) else "no difference is apart from 0"
        )
        lines.append(f"on {e.workloads[name].title}, {'; '.join(says) or nothing}")
    return f"**{part.name}** of {with_it} (off: {_keys(part)}): {'. '.join(_upper(line) for line in lines)}."


def _upper(line: str) -> str:
    return line[0].upper() + line[1:]


def _keys(part: AblatedPart) -> str:
    return ", ".join(f"`{key}` {value}" for key, value in part.without.items())


def _differences(found: AblationFindings, workload: str) -> LabTable:
    e, rows = found.runs.experiment, []
    for part in _parts_on(e, workload):
        limit = found.limit(part, workload)
        for link in found.links:
            worths = [found.worth(quantity, part, workload, link) for quantity in QUANTITIES]
            apart = ", ".join(w.name for w in (*worths, limit) if w is not None and w.apart)
            gains = (w.gain for w in worths)
            last = None if limit is None else limit.gain
            rows.append((part.name, str(systems_of(part)[0]), _keys(part), link, *gains, last, apart or "-"))
    columns = ("part", "of", "off", "link", *(quantity.name for quantity in QUANTITIES), LIMIT, "apart from 0")
    note = (
        f"With the part less without it, and the figures whose interval is apart from 0. The {LIMIT} is that of the fleet "
        "over all its texts, those to learn from and those of every link."
    )
    return LabTable(f"differences-{workload}", f"Differences on {e.workloads[workload].title}", columns, rows, note)


def _systems(found: AblationFindings, workload: str) -> LabTable:
    e, rows = found.runs.experiment, []
    for system in dict.fromkeys(system for part in _parts_on(e, workload) for system in systems_of(part)):
        limits = list(found.limits(system, workload).values())
        for link in found.links:
            means = [mean_of(list(found.values(q, system, workload, link).values())) for q in QUANTITIES]
            rows.append((str(system), link, *means, mean_of(limits) if limits else None))
    columns = ("system", "link", *(quantity.name for quantity in QUANTITIES), LIMIT)
    return LabTable(f"systems-{workload}", f"All systems on {e.workloads[workload].title}", columns, rows)


def _picture(found: AblationFindings, workload: str) -> LabPanels:
    e = found.runs.experiment
    parts = _parts_on(e, workload)
    names = [f"{part.name} ({part.preset})" for part in parts]
    panels = []
    for quantity in QUANTITIES:
        series = []
        for link in found.links:
            scaled = [_scaled(quantity, found.worth(quantity, part, workload, link)) for part in parts]
            series.append(ChartSeries(link, names, [s.mean for s in scaled], band=[s.half for s in scaled]))
        unit = "percentage points" if quantity.share else "% of the larger figure"
        panels.append(LabChart(quantity.name.replace(" ", "-"), quantity.name, "", unit, "bars", series))
    return LabPanels(f"fig-{workload}", f"What each part changes on {e.workloads[workload].title}", panels)


def _scaled(quantity: Quantity, worth: Worth) -> SeedMean:
    """A difference in percentage points, or in percent of the larger figure."""
    unit = 1.0 if quantity.share else max(worth.with_it.mean, worth.without.mean) or 1.0
    return SeedMean(100.0 * worth.gain.mean / unit, 100.0 * worth.gain.half / unit)
