"""The schedule of faults: a pure function of the seed and the parts.

Faults come in shuffled decks, each of which holds every fault once. In the first deck the four single kills come first.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

import msgspec

from fedhlm_lab.sim.liars import LIES

Kind = Literal["kill", "freeze", "cut", "stall", "throttle", "delay", "half-open-near", "half-open-far", "lie"]
Persistence = Literal["off", "on", "both"]

ROLES: Final = ("broker", "edge", "cloud", "agent")
LINKED: Final = ROLES[1:]  # the roles that have a link to the broker
ON_LINKS: Final[tuple[Kind, ...]] = ("cut", "stall", "throttle", "delay")
TOGETHER: Final = (("broker", "edge"), ("broker", "cloud"), ("broker", "agent"), ("edge", "cloud"), LINKED)

# Duration of a fault in seconds: (minimum, maximum). A stall or a freeze may be longer than the ten seconds after which
# a part gives up its link.
HOLD_S: Final[Mapping[Kind, tuple[float, float]]] = {
    "kill": (0.0, 3.0),
    "freeze": (1.0, 12.0),
    "cut": (0.2, 3.0),
    "stall": (1.0, 12.0),
    "throttle": (2.0, 6.0),
    "delay": (2.0, 6.0),
    "half-open-near": (0.0, 0.0),
    "half-open-far": (0.0, 0.0),
    "lie": (4.0, 12.0),
}
THROTTLE_BYTES_PER_S: Final = (500, 5_000)
DELAY_S: Final = (0.05, 0.6)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault: its kind, its targets, and its duration.

    `roles` are the roles of `targets`, which are names of parts. `amount` is the bytes/s of a throttle, the seconds of
    a delay, or the number of a lie, from 1 in the order of LIES. `keep`: a killed broker comes back with its retained messages, if it runs with persistence.
    """

    number: int
    kind: Kind
    roles: tuple[str, ...]
    targets: tuple[str, ...]
    hold_s: float
    amount: float = 0.0
    keep: bool = True

    @property
    def name(self) -> str:
        """The name under which faults of this kind are counted."""
        return f"{self.kind} {'+'.join(self.roles)}"


def schedule(
    seed: int,
    parts: Mapping[str, Sequence[str]],
    *,
    persistence: Persistence = "both",
    short: bool = False,
    only: Sequence[Kind] = (),
) -> Iterator[Fault]:
    """Yield endless faults. `parts` has the names of the parts in each role of ROLES.

    `short`: simple faults only. `only`: faults of these kinds only; empty for all.
    """
    rng = random.Random(f"chaos {seed}")
    number = 0
    while True:
        for kind, roles in _deck(rng, first=number == 0, short=short):
            if only and kind not in only:
                continue
            lowest, highest = HOLD_S[kind]
            yield Fault(
                number=number,
                kind=kind,
                roles=roles,
                targets=tuple(rng.choice(parts[role]) for role in roles),
                hold_s=round(rng.uniform(lowest, min(highest, 2.0) if short else highest), 2),
                amount=_amount(rng, kind),
                keep={"on": True, "off": False, "both": rng.random() < 0.5}[persistence],
            )
            number += 1


def _deck(rng: random.Random, *, first: bool, short: bool) -> list[tuple[Kind, tuple[str, ...]]]:
    kills: list[tuple[Kind, tuple[str, ...]]] = [("kill", (role,)) for role in ROLES]
    if short:
        others: list[tuple[Kind, tuple[str, ...]]] = [(kind, (rng.choice(LINKED),)) for kind in ON_LINKS]
    else:
        others = [(kind, (role,)) for kind in ON_LINKS for role in LINKED]
        others += [("kill", roles) for roles in TOGETHER]
        others += [("freeze", (role,)) for role in ROLES]
        others += [("cut", LINKED), ("stall", LINKED), ("lie", ("agent",))]
        # An unaware side with nothing to send waits for its keepalive, which takes long: so there is one of each per
        # deck.
        others += [("half-open-near", (rng.choice(LINKED),)), ("half-open-far", (rng.choice(LINKED),))]
    rng.shuffle(kills)
    rng.shuffle(others)
    if first:
        return kills + others
    deck = kills + others
    rng.shuffle(deck)
    return deck


def _amount(rng: random.Random, kind: Kind) -> float:
    match kind:
        case "throttle":
            return float(rng.randint(*THROTTLE_BYTES_PER_S))
        case "delay":
            return round(rng.uniform(*DELAY_S), 3)
        case "lie":
            return float(rng.randint(1, len(LIES)))
        case _:
            return 0.0
