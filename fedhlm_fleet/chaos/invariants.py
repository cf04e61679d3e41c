"""The invariants of a chaos run: what every answer must look like, whatever the fault.

A RequestStory is one request as a client hears it. `take` checks each Output against the earlier ones, and the last one
against the whole. This module does no I/O; `oracle` checks the tokens themselves.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from fedhlm.protocol.messages import Output, Sampling

# Log lines that a healthy part never writes. Refused messages, lost links and full queues are allowed.
LOG_PATTERN: Final = re.compile(
    r"Traceback \(most recent call last\)| ERROR | CRITICAL |never retrieved|never awaited|Exception ignored"
    r"|Task was destroyed|Segmentation fault|Fatal Python error"
)
LOG_CONTEXT_LINES: Final = 24


class BrokenInvariant(NamedTuple):
    """A violated invariant: its rule, the part or request concerned, and what happened."""

    rule: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.subject}: {self.text}"


class HeardToken(NamedTuple):
    """One committed token and its source."""

    token: int
    source: str


@dataclass
class RequestStory:
    """One request. Times are seconds of one monotonic clock.

    `tokens` is keyed by position. It has holes only if the broker died with outputs in its memory (`torn`). `given_up`
    says why the client stopped waiting. Later outputs are still checked, unless the agent was killed: a new one may
    begin the request again.
    """

    request: str
    agent: str
    prompt: str
    sampling: Sampling
    max_tokens: int
    asked_s: float
    tokens: dict[int, HeardToken] = field(default_factory=dict)
    text: str = ""
    torn: bool = False
    finish: str | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    given_up: str = ""
    agent_killed: bool = False
    duplicates: int = 0
    heard_s: float | None = None
    length: int = 0  # the position after the last token that was heard
    violations: list[BrokenInvariant] = field(default_factory=list)
    _messages: dict[int, Output] = field(default_factory=dict)  # by the sender's running number

    @property
    def open(self) -> bool:
        """Whether the request is neither finished nor given up."""
        return self.finish is None and not self.given_up

    @property
    def last_s(self) -> float:
        """The time of the latest output, or else of the request."""
        return self.asked_s if self.heard_s is None else self.heard_s

    def take(self, output: Output, now_s: float, *, may_miss: bool) -> list[HeardToken]:
        """Take in an output, and return its new tokens.

        `may_miss`: the broker may have lost outputs since the request was sent.
        """
        if self.agent_killed:
            return []
        self.heard_s = now_s
        before = self._messages.get(output.sequence)
        if before is not None:
            self.duplicates += 1
            if before != output:
                self._blame("changed", f"message {output.sequence} came as {_short(before)}, then as {_short(output)}")
            return []
        self._messages[output.sequence] = output
        if self.finish is not None:
            self._blame("after the end", f"{_short(output)} after finish {self.finish!r}")
            return []
        if len(output.ids) != len(output.sources):
            self._blame("malformed", f"{len(output.ids)} ids with {len(output.sources)} sources")
            return []
        if output.position < self.length:
            self._repeated(output)
            return []
        if output.position > self.length:
            if not may_miss:
                self._blame("gap", f"{_short(output)} where position {self.length} was due")
            self.torn = True
        new = [HeardToken(*pair) for pair in zip(output.ids, output.sources, strict=True)]
        self.tokens.update(enumerate(new, output.position))
        self.length = output.position + len(new)
        self.text += output.text
        if output.finish is not None:
            self.finish, self.statistics = output.finish, dict(output.statistics)
            self._ended(output.error)
        return new

    def _repeated(self, output: Output) -> None:
        pairs = enumerate(zip(output.ids, output.sources, strict=True), output.position)
        other = [at for at, pair in pairs if self.tokens.get(at, pair) != pair]
        if other:
            self._blame("changed", f"position {other[0]} was {self.tokens[other[0]]}, {_short(output)} says otherwise")
        else:
            self._blame("repeated", f"{_short(output)}, though {self.length} tokens were heard")

    def _ended(self, error: str) -> None:
        if self.finish == "cancelled" and self.given_up:
            return
        if self.finish not in ("length", "stop", "context"):
            self._blame("failed", f"finish {self.finish!r}: {error}")
        if self.length > self.max_tokens:
            self._blame("length", f"{self.length} tokens, at most {self.max_tokens} asked for")
        if self.finish == "length" and self.length != self.max_tokens:
            self._blame("length", f"finish 'length' after {self.length} of {self.max_tokens} tokens")
        counted = {
            f"tokens_{source}": count for source, count in Counter(t.source for t in self.tokens.values()).items()
        }
        told = {name: count for name, count in self.statistics.items() if name.startswith("tokens_")}
        fits = all(told.get(name, 0.0) >= count for name, count in counted.items()) if self.torn else told == counted
        if not fits:
            self._blame("statistics", f"it counts {told}, heard were {counted}")

    def _blame(self, rule: str, text: str) -> None:
        self.violations.append(BrokenInvariant(rule, f"{self.agent} {self.request}", text))

    def only_from(self, sources: frozenset[str]) -> bool:
        """Whether every token, heard or lost, is from these sources, as far as is known."""
        heard = {t.source for t in self.tokens.values()}
        if not self.torn:
            return heard <= sources
        told = {name for name, count in self.statistics.items() if name.startswith("tokens_") and count}
        return self.finish is not None and told <= {f"tokens_{source}" for source in sources}


def _short(output: Output) -> str:
    tokens = " ".join(f"{i}/{s}" for i, s in zip(output.ids, output.sources, strict=False))
    end = f" finish {output.finish}" if output.finish else ""
    return f"[{output.position}: {tokens}{end}]"


@dataclass
class Disturbances:
    """The times in which faults may lose the prompts and outputs of agents, which excuses the client for asking again.

    The disturbance of an agent lasts until the agent is heard again after the end of the fault.
    """

    _begun: dict[str, float] = field(default_factory=dict)
    _ended: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    _healed: dict[str, float] = field(default_factory=dict)

    def begin(self, agents: Iterable[str], now_s: float) -> None:
        """Begin a fault that may lose messages of these agents."""
        for agent in agents:
            self._begun.setdefault(agent, now_s)
            self._healed.pop(agent, None)

    def heal(self, agents: Iterable[str], now_s: float) -> None:
        """End the fault; each agent is excused until it is heard again."""
        for agent in agents:
            if agent in self._begun:
                self._healed[agent] = now_s

    def heard(self, agent: str, now_s: float) -> None:
        """Take in that an output of the agent arrived."""
        if agent in self._healed:
            del self._healed[agent]
            self._ended.setdefault(agent, []).append((self._begun.pop(agent), now_s))

    def since(self, agent: str, asked_s: float) -> bool:
        """Return whether a message of the agent may have been lost since `asked_s`."""
        return agent in self._begun or any(end >= asked_s for _, end in self._ended.get(agent, []))


def unanswered(stories: Iterable[RequestStory]) -> list[BrokenInvariant]:
    """Return a violation for each request that neither finished nor was given up."""
    return [
        BrokenInvariant("unanswered", f"{s.agent} {s.request}", f"{s.length} of {s.max_tokens} tokens, and no end")
        for s in stories
        if s.open
    ]


def fresh(stories: Sequence[RequestStory], healthy: frozenset[str]) -> list[BrokenInvariant]:
    """Check the requests after the last fault: answered, without holes, and with sources of a `healthy` fleet only."""
    found = unanswered(stories)
    for story in stories:
        sources = Counter(t.source for t in story.tokens.values())
        if story.finish is not None and (story.torn or not story.only_from(healthy)):
            found.append(
                BrokenInvariant("not recovered", f"{story.agent} {story.request}", f"tokens by source {dict(sources)}")
            )
    return found


def log_violations(part: str, text: str) -> list[BrokenInvariant]:
    """Return a violation for each error in a part's log; the lines of one traceback count once."""
    lines = text.splitlines()
    found: list[BrokenInvariant] = []
    skip_to = 0
    for number, line in enumerate(lines):
        if number >= skip_to and LOG_PATTERN.search(line):
            skip_to = number + LOG_CONTEXT_LINES
            found.append(BrokenInvariant("log", part, "\n    ".join(lines[max(0, number - 1) : skip_to])))
    return found


class GrowthLimits(NamedTuple):
    """Limits on the memory of one process in bytes.

    `ceiling` limits its peak, `growth` the increase from `settle_s` seconds after the start to the end.
    """

    ceiling: int
    growth: int
    settle_s: float


def growth_bytes(samples: Sequence[tuple[float, int]], settle_s: float) -> int | None:
    """Return how much the resident bytes grew from `settle_s` to the end, or None if the samples end before `settle_s`.

    `samples` are (seconds, resident bytes). The end counts as the minimum of the last tenth, so that a temporary peak
    is no growth.
    """
    settled = [size for at, size in samples if at - samples[0][0] >= settle_s]
    return min(settled[-max(1, len(settled) // 10) :]) - settled[0] if settled else None


def memory_violations(part: str, samples: Sequence[tuple[float, int]], limits: GrowthLimits) -> list[BrokenInvariant]:
    """Check the (seconds, resident bytes) samples of one process, which are in order of time."""
    peak = max((size for _, size in samples), default=0)
    grown = growth_bytes(samples, limits.settle_s)
    found = []
    if peak > limits.ceiling:
        found.append(
            BrokenInvariant(
                "memory",
                part,
                f"resident memory must be at most {limits.ceiling / 1e6:.0f} MB (got {peak / 1e6:.0f} MB)",
            )
        )
    if grown is not None and grown > limits.growth:
        text = (
            f"growth from {limits.settle_s:g} s after the start must be at most {limits.growth / 1e6:.0f} MB "
            f"(got {grown / 1e6:.0f} MB)"
        )
        found.append(BrokenInvariant("memory", part, text))
    return found
