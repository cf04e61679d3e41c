"""A decision that is made otherwise today, and how it is shown: what was decided, what is decided now, why."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from fedhlm.protocol.messages import Note

if TYPE_CHECKING:
    pass

# Of one life: what follows rests on the first, so more of them tell nothing new.
DIVERGENCES_MAX: Final = 10


class Divergence(NamedTuple):
    """One decision of the part `name`, `at_s` seconds on its clock; `where` says which, e.g. "session 812, token 17"."""

    part: str
    name: str
    at_s: float
    where: str
    recorded: str
    now: str
    why: str

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """What is to be said, with a word before each."""
        return ("then", self.recorded), ("now", self.now), ("why", self.why)


@dataclass(kw_only=True)
class CheckOutcome:
    """What checking one life gave: decisions compared, the first divergences, what could not be compared, in words.

    `notes` is the journal with the same inputs and the decisions of now.
    """

    decisions: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def diverge(self, divergence: Divergence) -> None:
        """Add a divergence, if there are not too many."""
        if len(self.divergences) < DIVERGENCES_MAX:
            self.divergences.append(divergence)


def plain(divergences: Iterable[Divergence]) -> str:
    """For logs and files: a headline each, and three lines below it."""
    return "\n".join(
        "\n".join([_headline(d), *(f"  {word:<5} {text}" for word, text in d.lines if text)]) for d in divergences
    )


def _headline(d: Divergence) -> str:
    name = d.name if d.name.startswith(d.part) else f"{d.part} {d.name}"
    return f"{name}, {d.at_s:.3f} s, {d.where}"
