"""Faults as data: a spec such as `drop=0.1,partition` becomes a seeded schedule of timed events.

`Weather` applies a schedule. The state of a link or a part at any time follows from the events active then. Any
subset of a schedule is therefore a schedule, which can be saved, run again and shrunk.
"""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple

import msgspec

from fedhlm.errors import ConfigError
from fedhlm_lab.sim.liars import LIES
from fedhlm_lab.sim.link import LinkModel
from fedhlm_lab.sim.links import LinkProfile
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from fedhlm_lab.sim.parts import Part

PAIR: Final = "|"
BROKER: Final = "broker"
EVERYWHERE: Final = "*"
_CALM_S: Final = 8.0  # the default amounts are meant for this span


class Event(msgspec.Struct, frozen=True, array_like=True):
    """A fault at `target` from `at_s` for `for_s` seconds.

    The target is a client's link, all links (`*`), a part, or two clients (`a|b`).
    """

    at_s: float
    kind: str
    target: str
    for_s: float
    amount: float = 0.0

    def __str__(self) -> str:
        amount = f" {self.amount:g}" if self.amount else ""
        return f"{self.at_s:7.2f} s  {self.kind}{amount} at {self.target} for {self.for_s:g} s"


class Targets(NamedTuple):
    """Possible targets of faults: clients' links, pairs of clients, and parts (the broker only for crashes)."""

    links: Sequence[str]
    pairs: Sequence[str]
    parts: Sequence[str]


class Span(NamedTuple):
    """The duration and amount of a fault."""

    for_s: float
    amount: float


class FaultKind(NamedTuple):
    """One kind of fault, with at most `most` events in a schedule.

    Amounts lie in `low`..`high`. An event draws its amount up to the spec's, by default `amount`.
    """

    most: int
    amount: float
    low: float
    high: float
    meaning: str
    targets: Callable[[Targets], Sequence[str]]
    draw: Callable[[random.Random, float, float], Span]


def _share(rng: random.Random, amount: float, calm_s: float) -> Span:
    return Span(rng.uniform(0.1, 1.0) * calm_s, rng.uniform(0.25, 1.0) * amount)


def _outage(rng: random.Random, amount: float, calm_s: float) -> Span:
    return Span(rng.choice((0.05, 0.4, 1.0)) * amount * calm_s / _CALM_S, 0.0)


def _error(rng: random.Random, amount: float, calm_s: float) -> Span:
    return Span(rng.uniform(0.1, 1.0) * calm_s, rng.uniform(-1.0, 1.0) * amount)


def _pace(rng: random.Random, amount: float, calm_s: float) -> Span:
    for_s = rng.uniform(0.05, 0.4) * calm_s
    return Span(for_s, rng.choice((rng.uniform(0.25, 1.0) * amount, for_s)))  # slow, or gone


def _room(rng: random.Random, amount: float, calm_s: float) -> Span:
    return Span(rng.uniform(0.1, 0.5) * calm_s, float(rng.randint(1, round(amount))))


def _kind_of_lie(rng: random.Random, amount: float, calm_s: float) -> Span:
    return Span(rng.uniform(0.3, 1.0) * calm_s, float(rng.randint(1, round(amount))))


def _agents(targets: Targets) -> Sequence[str]:
    return [part for part in targets.parts if part.startswith("agent-")]


def _linked(targets: Targets) -> Sequence[str]:
    # Half of the events hit every link: some faults only do harm if they hit both a message and its answer.
    return (*targets.links, *len(targets.links) * (EVERYWHERE,))


def _crashing(targets: Targets) -> Sequence[str]:
    return (*targets.parts, BROKER)


def _cutting(targets: Targets) -> Sequence[str]:
    return (*targets.links, *targets.pairs)


KINDS: Final[dict[str, FaultKind]] = {
    "drop": FaultKind(6, 0.3, 0.0, 1.0, "share of the messages of a link that are lost", _linked, _share),
    "duplicate": FaultKind(8, 0.5, 0.0, 1.0, "share of the messages that are duplicated", _linked, _share),
    "reorder": FaultKind(10, 0.5, 0.0, 1.0, "share of the messages that are overtaken", _linked, _share),
    "spikes": FaultKind(4, 1.0, 0.0, 3_600.0, "seconds of delay more", _linked, _share),
    "partition": FaultKind(
        4, 5.0, 0.0, 3_600.0, "seconds at most that a link or a pair of clients is cut", _cutting, _outage
    ),
    "crash": FaultKind(3, 4.0, 0.0, 3_600.0, "seconds at most that a part or the broker is down", _crashing, _outage),
    "crash-disk": FaultKind(3, 4.0, 0.0, 3_600.0, "the same, and its disk is lost", _crashing, _outage),
    "skew": FaultKind(
        3, 3_600.0, 0.0, 1e9, "seconds at most that a part's clock is wrong, either way", lambda t: t.parts, _error
    ),
    "slow": FaultKind(
        4, 0.2, 0.0, 3_600.0, "seconds that a part takes over a message; half of them stall", lambda t: t.parts, _pace
    ),
    "full": FaultKind(4, 4.0, 1.0, 4_096.0, "messages at most that a part's queues hold", lambda t: t.parts, _room),
    "liar": FaultKind(
        2,
        len(LIES),
        1.0,
        len(LIES),
        f"one of the first so many lies, 1 to {len(LIES)}: {', '.join(LIES)}",
        _agents,
        _kind_of_lie,
    ),
}


def parse(spec: str) -> dict[str, float]:
    """Parse a spec such as `drop=0.1,partition,skew=3600`, `all`, `none` or `all,drop=0.5` into amounts by kind.

    Raises:
        ConfigError: an unknown kind, or an amount outside its limits.
    """
    amounts: dict[str, float] = {}
    for word in (w.strip() for w in spec.split(",")):
        name, given, value = word.partition("=")
        if word == "all":
            amounts = {k: kind.amount for k, kind in KINDS.items()} | amounts
        elif name in KINDS:
            amounts[name] = _amount(name, value) if given else KINDS[name].amount
        elif word != "none" or amounts:
            raise ConfigError("--faults", word, f"all, none, or a list of {', '.join(KINDS)}, each with =AMOUNT or not")
    return amounts


def _amount(name: str, text: str) -> float:
    kind = KINDS[name]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not kind.low <= value <= kind.high:
        wanted = f"a number from {kind.low:g} to {kind.high:g}, {kind.meaning}"
        raise ConfigError(f"--faults {name}", text, wanted)
    return value


def schedule(amounts: dict[str, float], targets: Targets, *, seed: int, calm_s: float) -> tuple[Event, ...]:
    """The events of one seed, in order of time.

    All end by `calm_s`; times are whole milliseconds.
    """
    events = []
    for name in sorted(amounts):  # one stream per kind, so that kinds do not affect one another
        kind = KINDS[name]
        rng = random.Random(f"{seed}/{name}")
        places = kind.targets(targets)
        for _ in range(rng.randint(1, kind.most)):
            at_s = round(rng.uniform(0.0, 0.95 * calm_s), 3)
            span = kind.draw(rng, amounts[name], calm_s)
            for_s = round(max(0.001, min(span.for_s, calm_s - at_s)), 3)
            events.append(Event(at_s, name, rng.choice(places), for_s, float(f"{span.amount:.3g}")))
    return tuple(sorted(events, key=lambda e: (e.at_s, e.kind, e.target)))


class Weather:
    """Applies a schedule to a fleet. `profile_of` gives a link without faults."""

    def __init__(
        self,
        broker: LoopbackBroker,
        *,
        parts: dict[str, Part],
        link: Callable[[str], LinkModel],
        links: Sequence[str],
        profile_of: Callable[[str], LinkProfile],
    ) -> None:
        self.injected: Counter[str] = Counter()
        self._broker = broker
        self._parts = parts
        self._link = link
        self._links = links
        self._profile_of = profile_of
        self._going_on: defaultdict[str, list[Event]] = defaultdict(list)

    async def unfold(self, events: Iterable[Event]) -> None:
        """Apply all events and return when every one has ended."""
        turns = [(e.at_s, i, e, True) for i, e in enumerate(events)]
        turns += [(e.at_s + e.for_s, i, e, False) for _, i, e, _ in turns]
        now_s = asyncio.get_running_loop().time
        for when_s, _, event, begins in sorted(turns, key=lambda turn: (turn[0], turn[3], turn[1])):
            if when_s > now_s():
                await asyncio.sleep(when_s - now_s())
            await self._turn(event, begins=begins)

    async def _turn(self, event: Event, *, begins: bool) -> None:
        active = self._going_on[event.target]
        if begins:
            self.injected[event.kind] += 1
            active.append(event)
        else:
            active.remove(event)
        if PAIR in event.target:
            self._cut(event.target, apart=bool(active))
        elif event.kind in _EFFECTS_ON_PARTS:
            part = self._parts[event.target]
            part.skew_s, part.pace_s, part.room, part.lie = 0.0, 0.0, None, None
            for e in active:
                _EFFECTS_ON_PARTS.get(e.kind, _nothing)(part, e.amount)
        elif event.kind in _CRASHES:
            await self._crash(event, [e for e in active if e.kind in _CRASHES], begins=begins)
        else:
            for name in self._links if event.target == EVERYWHERE else (event.target,):
                self._change(name)

    def _change(self, name: str) -> None:
        link, active = self._link(name), self._going_on[name] + self._going_on[EVERYWHERE]
        self._profile_of(name).apply(link)
        for e in active:
            _EFFECTS_ON_LINKS.get(e.kind, _nothing)(link, e.amount)
        link.partitioned = any(e.kind == "partition" for e in active)

    def _cut(self, pair: str, *, apart: bool) -> None:
        one, other = pair.split(PAIR)
        act = self._broker.cut if apart else self._broker.mend
        act(one, other)
        act(other, one)

    async def _crash(self, event: Event, down: Sequence[Event], *, begins: bool) -> None:
        lost = begins and event.kind == "crash-disk"
        if event.target == BROKER:
            if begins:
                self._broker.stop(forget=lost)
            elif not down:
                self._broker.start()
            return
        part = self._parts[event.target]
        if begins:
            await part.crash()
            if lost:
                part.disk.files.clear()
        elif not down:
            part.start()


def _nothing(_target: object, _amount: float) -> None:
    """Do nothing: events of this kind are applied elsewhere."""


def _more(name: str, link: LinkModel, amount: float) -> None:
    # Independent chances: two losses of one half do not make a certain loss.
    setattr(link, name, 1.0 - (1.0 - float(getattr(link, name))) * (1.0 - amount))


def _later(link: LinkModel, amount: float) -> None:
    link.delay_s += amount


def _skew(part: Part, amount: float) -> None:
    part.skew_s += amount


def _slow(part: Part, amount: float) -> None:
    part.pace_s += amount


def _squeeze(part: Part, amount: float) -> None:
    part.room = min(round(amount), part.room or round(amount))


def _tempt(part: Part, amount: float) -> None:
    part.lie = list(LIES)[round(amount) - 1]


_CRASHES: Final = ("crash", "crash-disk")
_EFFECTS_ON_LINKS: Final[dict[str, Callable[[LinkModel, float], None]]] = {
    "drop": partial(_more, "loss"),
    "duplicate": partial(_more, "duplicate"),
    "reorder": partial(_more, "reorder"),
    "spikes": _later,
}
_EFFECTS_ON_PARTS: Final[dict[str, Callable[[Part, float], None]]] = {
    "skew": _skew,
    "slow": _slow,
    "full": _squeeze,
    "liar": _tempt,
}
