"""A requested generation and its result."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edge_agent.events import Committed, Finish, Observation
from fedhlm.answering import Drafting
from fedhlm.learning.certificate import Certificate
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm.receipts import Receipt
from fedhlm.settings import Generation


class Job(NamedTuple):
    """A requested generation: its merged configuration, its sampling parameters, and its limits in tokens."""

    config: Generation
    sampling: Sampling
    max_tokens: int
    context_max: int
    eos_ids: frozenset[int]


@dataclass
class GenerationResult:
    """A finished generation: its ids, who settled each of them, why it ended, and what it cost.

    `uplink_bytes` go to the cloud, and `cluster_bytes` to the peers and the federation. `escalation_bytes` are the
    uplink's bytes with headers of fixed size, on which decisions are based. `tau` and `similarity` are the thresholds
    that were used. `drafts` counts the drafts that the LLM has looked at, and `approximate` the verdicts with tokens
    that are not certain to be its own.
    """

    ids: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    finish: FinishReason = "error"
    error: str = ""
    uplink_bytes: int = 0
    uplink_messages: int = 0
    escalation_bytes: int = 0
    cluster_bytes: int = 0
    round_trips: int = 0
    rollbacks: int = 0
    drafts: int = 0
    approximate: int = 0
    discarded: int = 0
    escalated: int = 0
    tau: float = 1.0
    similarity: float | None = None
    observed: list[Observation] = field(default_factory=list)
    ended: Finish = Finish("error")  # noqa: RUF009 - never modified
    certificate: Certificate | None = None
    fleet: Certificate | None = None
    confidence: float = 0.95
    receipt: Receipt | None = None
    wall_s: float = 0.0
    _sent: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # by epoch and base: fixed ids, drafts
    _accepted: Counter[int] = field(default_factory=Counter)

    def sent(self, epoch: int, base: int, *, fixed: int, drafts: int) -> None:
        """Note a block that asks for the verification of drafts."""
        if drafts:
            self._sent.setdefault((epoch, base), (fixed, drafts))

    def settled(self, epoch: int, base: int, accepted: int) -> None:
        """Note the LLM's verdict on a block. `accepted` counts its ids, fixed ones included."""
        fixed, drafts = self._sent.pop((epoch, base), (0, 0))
        if drafts:
            self._accepted.update((max(0, accepted - fixed),))
            self.drafts += drafts

    def drafting(self) -> Drafting:
        """How the drafts fared that the LLM has looked at."""
        return Drafting(self.drafts, tuple(self._accepted[j] for j in range(max(self._accepted, default=-1) + 1)))

    def commit(self, tokens: Sequence[Committed]) -> None:
        """Add committed tokens."""
        self.ids += [t.token for t in tokens]
        self.sources += [t.source for t in tokens]
        self.drafted += [t.drafted for t in tokens]

    def keep(self, count: int) -> None:
        """Drop all tokens after the first `count`, if the text ended earlier."""
        for kept in (self.ids, self.sources, self.drafted):
            del kept[count:]

    def always_verified(self) -> Counter[str]:
        """The numbers of tokens that were verified whatever their doubt, by rule."""
        return Counter(o.rule for o in self.observed if o.rule and not o.skipped)

    def summary(self) -> str:
        """A summary for the log, in one line: why it ended, its tokens by source, its time and its bytes."""
        by_source = ", ".join(f"{count} {source}" for source, count in sorted(Counter(self.sources).items()))
        why = f" ({' '.join(self.error.split())})" if self.error else ""
        return (
            f"{self.finish}{why}, {len(self.ids)} tokens{f' ({by_source})' if by_source else ''}, "
            f"{self.wall_s * 1000.0:.0f} ms, {self.uplink_bytes:,} bytes up, {self.cluster_bytes:,} to the cluster"
        )

    def statistics(self) -> dict[str, float]:
        """Statistics for the last message of a request."""
        by_source = {f"tokens_{source}": float(count) for source, count in Counter(self.sources).items()}
        betas = [o.beta for o in self.observed if SOURCES[o.source].kept]
        by_rule = {f"verified_{rule}": float(count) for rule, count in self.always_verified().items()}
        figures = (
            by_source
            | by_rule
            | {
                "uplink_bytes": float(self.uplink_bytes),
                "uplink_messages": float(self.uplink_messages),
                "cluster_bytes": float(self.cluster_bytes),
                "round_trips": float(self.round_trips),
                "rollbacks": float(self.rollbacks),
                "discarded": float(self.discarded),
                "escalated": float(self.escalated),
                "mean_beta": sum(betas) / len(betas) if betas else 0.0,
                "tau": self.tau,
                "wall_s": self.wall_s,
            }
        )
        if self.approximate:
            figures["approximate"] = float(self.approximate)
        if self.similarity is not None:
            figures["similarity"] = self.similarity
        if self.certificate is not None:
            figures |= {"risk": self.certificate.estimate, "risk_limit": self.certificate.limit(self.confidence)}
            figures |= {f"risk_{name}": value for name, value in self.certificate.figures().items()}
        if self.fleet is not None:
            known = self.fleet
            figures |= {"fleet_risk": known.estimate, "fleet_risk_limit": known.limit(self.confidence)}
            figures |= {"fleet_risk_tokens": known.tokens, "fleet_risk_texts": known.texts}
        return figures
