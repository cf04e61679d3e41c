"""Which fault comes when: a pure function of the seed and of who takes part.

Faults come in decks. Each deck holds every fault once, shuffled, the four plain kills of the first one before all others.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

import msgspec

Kind = Literal["kill", "freeze", "cut", "stall", "throttle", "delay", "half-open-near", "half-open-far"]
Persistence = Literal["off", "on", "both"]

ROLES: Final = ("broker", "edge", "cloud", "agent")
LINKED: Final = ROLES[1:]  # who has a link of its own to the broker
ON_LINKS: Final[tuple[Kind, ...]] = ("cut", "stall", "throttle", "delay")
TOGETHER: Final = (("broker", "edge"), ("broker", "cloud"), ("broker", "agent"), ("edge", "cloud"), LINKED)

# Seconds that a fault lasts: (shortest, longest). A stall or a frozen process may outlast the ten seconds after which a
# part gives up its link.
HOLD_S: Final[Mapping[Kind, tuple[float, float]]] = {
    "kill": (0.0, 3.0),
    "freeze": (1.0, 12.0),
    "cut": (0.2, 3.0),
    "stall": (1.0, 12.0),
    "throttle": (2.0, 6.0),
    "delay": (2.0, 6.0),
    "half-open-near": (0.0, 0.0),
    "half-open-far": (0.0, 0.0),
}
THROTTLE_BYTES_PER_S: Final = (500, 5_000)
DELAY_S: Final = (0.05, 0.6)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault: what happens to whom for how long.

    `roles` says what `targets` (names of parts) are. `amount` is bytes/s of a throttle and seconds of a delay. `keep`: a
    broker that is killed comes back with its retained messages, if it runs with persistence.
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
        """What is counted as one sort of fault."""
        return f"{self.kind} {'+'.join(self.roles)}"


def schedule(
    seed: int, parts: Mapping[str, Sequence[str]], *, persistence: Persistence = "both", short: bool = False
) -> Iterator[Fault]:
    """Faults without end. `parts` has the names of those in each role of ROLES; `short` leaves all but the plain ones out."""
    rng = random.Random(f"chaos {seed}")
    number = 0
    while True:
        for kind, roles in _deck(rng, first=number == 0, short=short):
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
        others += [("cut", LINKED), ("stall", LINKED)]
        # Only an unaware side that has nothing to send waits for its keepalive, which is long: one of each a deck.
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
        case _:
            return 0.0
