"""The report of a chaos run: faults and recoveries by kind, requests and tokens, memory, violations."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, Self

import msgspec

from fedhlm_fleet.chaos.invariants import BrokenInvariant, RequestStory
from fedhlm_fleet.chaos.oracle import Judgement
from fedhlm_fleet.chaos.parts import MemoryUse


class Recovery(NamedTuple):
    """The recovery after one fault, in seconds from its end.

    `token_s`: until all agents concerned had a token from the cloud. `steady_s`: until each had answered a new request
    without an unverified token.
    """

    fault: str
    token_s: float
    steady_s: float


class Recovered(msgspec.Struct, frozen=True):
    """The recoveries after all faults of one kind."""

    faults: int
    token_median_s: float
    token_worst_s: float
    steady_median_s: float
    steady_worst_s: float


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one run, which passes if there are no violations."""

    options: dict[str, Any]
    wall_s: float
    faults: dict[str, Recovered]
    requests: int
    answered: int
    asked_again: int
    torn: int
    tokens: dict[str, int]
    judged: dict[str, int]
    unjudged: int
    ties: int
    regrets: dict[str, float]
    errors: dict[str, tuple[int, int]]
    duplicates: int
    strangers: int
    memory: dict[str, MemoryUse]
    violations: list[BrokenInvariant]

    @property
    def passed(self) -> bool:
        """Whether every invariant held."""
        return not self.violations

    @classmethod
    def of(
        cls,
        *,
        options: dict[str, Any],
        stories: Sequence[RequestStory],
        recoveries: Sequence[Recovery],
        judgement: Judgement,
        memory: Mapping[str, MemoryUse],
        violations: Sequence[BrokenInvariant],
        wall_s: float,
        strangers: int,
    ) -> Self:
        """Sum up a run."""
        by_fault: defaultdict[str, list[Recovery]] = defaultdict(list)
        for recovery in recoveries:
            by_fault[recovery.fault].append(recovery)
        return cls(
            options=options,
            wall_s=wall_s,
            faults={name: _recovered(those) for name, those in sorted(by_fault.items())},
            requests=len(stories),
            answered=sum(s.finish is not None for s in stories),
            asked_again=sum(bool(s.given_up) for s in stories),
            torn=sum(s.torn for s in stories),
            tokens=dict(Counter(t.source for s in stories for t in s.tokens.values())),
            judged=judgement.tokens,
            unjudged=judgement.unjudged,
            ties=judgement.ties,
            regrets=judgement.regrets,
            errors=judgement.errors,
            duplicates=sum(s.duplicates for s in stories),
            strangers=strangers,
            memory=dict(memory),
            violations=list(violations),
        )

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        width = max((len(name) for name in self.faults), default=5)
        shown = [f"{'fault':<{width}}  count   to a token: median, worst   to a text: median, worst"]
        shown += [
            f"{name:<{width}}  {f.faults:>5}  {f.token_median_s:>17.2f} s {f.token_worst_s:>5.2f} s"
            f"  {f.steady_median_s:>16.2f} s {f.steady_worst_s:>5.2f} s"
            for name, f in self.faults.items()
        ]
        tokens = ", ".join(f"{count} {source}" for source, count in sorted(self.tokens.items()))
        regrets = ", ".join(f"{rule} {value:.2g}" for rule, value in sorted(self.regrets.items()))
        errors = ", ".join(f"{agent} {wrong} of {heard}" for agent, (wrong, heard) in sorted(self.errors.items()))
        memory = ", ".join(f"{name} {_megabytes(m)}" for name, m in sorted(self.memory.items()))
        shown += [
            "",
            f"{sum(f.faults for f in self.faults.values())} faults in {self.wall_s:.0f} s",
            f"requests: {self.requests}, answered {self.answered}, asked again {self.asked_again}, with holes {self.torn}",
            f"tokens: {tokens or 'none'}; judged {sum(self.judged.values())}, not judged {self.unjudged}, near ties {self.ties}",
            f"largest regret: {regrets or 'none'}",
            f"kept tokens that the LLM would not have written: {errors or 'none'}",
            f"messages heard twice: {self.duplicates}; not ours: {self.strangers}",
            f"peak memory, MB (growth after settling): {memory}",
            f"violations: {len(self.violations)}",
            *(f"  {violation}" for violation in self.violations),
        ]
        return shown


def _megabytes(memory: MemoryUse) -> str:
    grown = "" if memory.growth_bytes is None else f" ({memory.growth_bytes / 1e6:+.0f} in {memory.longest_s:.0f} s)"
    return f"{memory.peak_bytes / 1e6:.0f}{grown}"


def _recovered(those: Sequence[Recovery]) -> Recovered:
    tokens, texts = [r.token_s for r in those], [r.steady_s for r in those]
    return Recovered(len(those), median(tokens), max(tokens), median(texts), max(texts))
