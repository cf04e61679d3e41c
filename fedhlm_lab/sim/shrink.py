"""Shrink a failing scenario to a small one that fails the same way: first fewer events, then less of everything else.

Delta debugging (Zeller and Hildebrandt, IEEE TSE 28(2), 2002) removes events: halves, then finer parts, until no
single event can go. Each step is a whole run, so the result was seen to fail.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from fedhlm_lab.sim.faults import BROKER, EVERYWHERE, KINDS, Event
from fedhlm_lab.sim.invariants import Violation
from fedhlm_lab.sim.scenario import Scenario
from fedhlm_lab.sim.simulator import simulate

RUNS_MAX: Final = 400

Try = Callable[[Scenario], Violation | None]


class Shrunk(NamedTuple):
    """The smallest scenario found, its violation, and the number of runs."""

    scenario: Scenario
    violation: Violation
    runs: int


def attempt(scenario: Scenario) -> Violation | None:
    """Run a scenario; return the violation, if any."""
    try:
        simulate(scenario)
    except Violation as violation:
        return violation
    return None


def shrink(scenario: Scenario, violation: Violation, *, runs_max: int = RUNS_MAX, run: Try = attempt) -> Shrunk:
    """Find the smallest scenario that violates the same invariant within `runs_max` runs."""
    best = _Best(scenario, violation, runs_max, run)
    changed = True
    while changed and not best.exhausted:
        changed = _fewer_events(best)
        for candidates in (_smaller, _shorter):
            changed |= _simpler(best, candidates)
    return Shrunk(best.scenario, best.violation, best.runs)


class _Best:
    def __init__(self, scenario: Scenario, violation: Violation, runs_max: int, run: Try) -> None:
        self.scenario, self.violation = scenario, violation
        self.runs = 0
        self._runs_max, self._run = runs_max, run

    @property
    def exhausted(self) -> bool:
        return self.runs >= self._runs_max

    def take(self, candidate: Scenario) -> bool:
        """Accept the candidate if it fails the same way."""
        if self.exhausted:
            return False
        self.runs += 1
        violation = self._run(candidate)
        if violation is None or violation.name != self.violation.name:
            return False
        self.scenario, self.violation = candidate, violation
        return True


def _fewer_events(best: _Best) -> bool:
    """Delta debugging over the schedule; return whether any event was removed."""
    began = len(best.scenario.schedule)
    parts = 2
    while (events := best.scenario.schedule) and not best.exhausted:
        size = -(-len(events) // parts)
        without = ((*events[:start], *events[start + size :]) for start in range(0, len(events), size))
        if any(best.take(replace(best.scenario, schedule=kept)) for kept in without):
            parts = max(2, parts - 1)
        elif size == 1:
            break
        else:
            parts = min(len(events), 2 * parts)
    return len(best.scenario.schedule) < began


def _simpler(best: _Best, candidates: Callable[[Scenario], Iterator[Scenario]]) -> bool:
    """Accept the first candidate that fails too, repeatedly; return whether there was one."""
    changed = False
    while any(best.take(candidate) for candidate in candidates(best.scenario)):
        changed = True
    return changed


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Candidates with less of one thing; events with a removed target go too."""
    for name in ("clusters", "agents", "prompts", "tokens"):
        value = getattr(scenario, name)
        for smaller in sorted({1, value // 2, value - 1}):
            if 1 <= smaller < value:
                candidate = replace(scenario, **{name: smaller})
                yield replace(candidate, schedule=tuple(_within(candidate, scenario.schedule)))


def _least(event: Event) -> float:
    """Candidates with smaller amounts; below a hundredth of the usual one they explain nothing more."""
    return 0.0 if event.amount == 0.0 else 0.01 * KINDS[event.kind].amount


def _within(scenario: Scenario, events: Sequence[Event]) -> Iterator[Event]:
    targets = scenario.targets()
    known = {*targets.links, *targets.pairs, *targets.parts, BROKER, EVERYWHERE}
    return (event for event in events if event.target in known)


def _shorter(scenario: Scenario) -> Iterator[Scenario]:
    """Candidates with one event of half the length or half the amount."""
    for i, event in enumerate(scenario.schedule):
        for changed in (
            Event(event.at_s, event.kind, event.target, round(event.for_s / 2, 3), event.amount),
            Event(event.at_s, event.kind, event.target, event.for_s, float(f"{event.amount / 2:.3g}")),
        ):
            if (
                changed != event
                and changed.for_s >= 0.01
                and changed.amount >= max(KINDS[event.kind].low, _least(event))
            ):
                yield replace(scenario, schedule=(*scenario.schedule[:i], changed, *scenario.schedule[i + 1 :]))
