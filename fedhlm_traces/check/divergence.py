"""A divergence: what was decided then, what is decided now, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from fedhlm.protocol.messages import Note

if TYPE_CHECKING:
    pass

# Per life. Later divergences follow from the first, so more of them add nothing.
DIVERGENCES_MAX: Final = 10


class Divergence(NamedTuple):
    """One divergent decision of the part `name`, `at_s` seconds into its clock.

    `where` names the decision, e.g. "session 812, token 17".
    """

    part: str
    name: str
    at_s: float
    where: str
    recorded: str
    now: str
    why: str

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """The lines to print, each with its label."""
        return ("then", self.recorded), ("now", self.now), ("why", self.why)


@dataclass(kw_only=True)
class CheckOutcome:
    """Result of checking one life: decisions compared, first divergences, and what was skipped.

    `notes` is the journal with the same inputs and today's decisions.
    """

    decisions: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def diverge(self, divergence: Divergence) -> None:
        """Add a divergence, up to the limit."""
        if len(self.divergences) < DIVERGENCES_MAX:
            self.divergences.append(divergence)


def plain(divergences: Iterable[Divergence]) -> str:
    """For logs and files: one headline per divergence and three lines below it."""
    return "\n".join(
        "\n".join([_headline(d), *(f"  {word:<5} {text}" for word, text in d.lines if text)]) for d in divergences
    )


def _headline(d: Divergence) -> str:
    name = d.name if d.name.startswith(d.part) else f"{d.part} {d.name}"
    return f"{name}, {d.at_s:.3f} s, {d.where}"
