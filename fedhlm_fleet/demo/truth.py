"""What a demo's certificates say beside the truth: every kept token is scored by the LLM, whatever the audit's coin said."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich import box
from rich.table import Table

from fedhlm.learning.certificate import Certificate
from fedhlm_fleet.demo.report import Generated, TruthRow

ALL: Final = "all"


@dataclass
class _Story:
    """The texts of one agent so far: cumulative numbers by texts, and the newest certificate."""

    tokens: list[int] = field(default_factory=lambda: [0])
    kept: list[int] = field(default_factory=lambda: [0])
    wrong: list[int] = field(default_factory=lambda: [0])
    certificate: Certificate = field(default_factory=Certificate)
    above: bool = False

    @property
    def counted(self) -> int:
        """The number of texts that the certificate accounts for; it takes them in their order."""
        return min(round(self.certificate.texts), len(self.tokens) - 1)

    def add(self, request: Generated, kept: int, wrong: int, confidence: float) -> None:
        """Add a finished text. A certificate knows no texts without tokens."""
        if request.ids:
            ruled = sum(count for name, count in request.statistics.items() if name.startswith("verified_"))
            self.tokens.append(self.tokens[-1] + len(request.ids) - round(ruled))
            self.kept.append(self.kept[-1] + kept)
            self.wrong.append(self.wrong[-1] + wrong)
        named = {
            name.removeprefix("risk_"): value for name, value in request.statistics.items() if name.startswith("risk_")
        }
        if "tokens" in named:
            self.certificate = Certificate.of_figures(named)
            known = self.counted
            limit = self.certificate.limit(confidence)
            self.above |= known > 0 and self.wrong[known] > limit * self.tokens[known]


def truth_rows(
    requests: Sequence[Generated], scores: Iterable[tuple[int, int]], *, temperature: float, confidence: float
) -> list[TruthRow]:
    """Compare certificates with the truth: a row for each agent and temperature, and one for all agents together.

    `scores` has the kept and the wrong tokens of each request, and `temperature` is that of requests without one.
    """
    stories: dict[tuple[float, str], _Story] = {}
    for request, (kept, wrong) in zip(requests, scores, strict=True):
        if request.finish is not None:
            at = temperature if request.temperature is None else request.temperature
            stories.setdefault((at, request.agent), _Story()).add(request, kept, wrong, confidence)
    rows = []
    for at in dict.fromkeys(at for at, _ in stories):
        agents = sorted((agent, story) for (other, agent), story in stories.items() if other == at)
        for name, part in (*((agent, [story]) for agent, story in agents), (ALL, [story for _, story in agents])):
            known = sum((story.certificate for story in part), Certificate())
            tokens, kept, wrong = (
                sum(getattr(story, name)[story.counted] for story in part) for name in ("tokens", "kept", "wrong")
            )
            rows.append(
                TruthRow(
                    agent=name,
                    temperature=at,
                    texts=sum(story.counted for story in part),
                    tokens=tokens,
                    kept=kept,
                    wrong=wrong,
                    truth=wrong / tokens if tokens else 0.0,
                    risk=known.estimate,
                    risk_limit=known.limit(confidence),
                    ever_above=any(story.above for story in part),
                )
            )
    return rows


def truth_table(rows: Sequence[TruthRow]) -> Table:
    """The rows as a table. The temperature is shown where there are several."""
    several = len({row.temperature for row in rows}) > 1
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    made.add_column("", no_wrap=True)
    for heading in ("texts", "tokens", "kept", "wrong", "truth", "R-hat", "limit", "ever above"):
        made.add_column(heading, justify="right")
    for row in rows:
        counts = (row.texts, row.tokens, row.kept, row.wrong)
        shares = (row.truth, row.risk, row.risk_limit)
        made.add_row(
            f"{row.agent}, {row.temperature:g}" if several else row.agent,
            *map(str, counts),
            *(f"{share:.4f}" for share in shares),
            "yes" if row.ever_above else "no",
        )
    return made
