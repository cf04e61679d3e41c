"""Explain a divergence of an edge or a cloud: doubts, evidence for them, and differences of sums."""

from typing import Final, NamedTuple

import numpy as np

from edge_broker.memory import ClusterMemory
from fedhlm.errors import ProtocolError
from fedhlm.learning.curve import Curve
from fedhlm.protocol.messages import (
    Contribution,
    Escalation,
    Fingerprint,
    Hints,
    Learned,
    UncertainTokens,
    Verdict,
)
from fedhlm_traces.check.compare import same
from fedhlm_traces.spelling import Spell

_SUMS: Final = ("seen", "weight", "harm", "square")


class Doubt(NamedTuple):
    """A doubtful draft and its position."""

    agent: str
    session: int
    position: int
    token: int
    key: bytes


class Doubts:
    """All doubts received, the latest one for each position and key."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, int, int], Doubt] = {}
        self._by_key: dict[bytes, Doubt] = {}

    def take(self, agent: str, message: UncertainTokens) -> None:
        """Remember an agent's doubts."""
        for item in message.items:
            doubt = Doubt(agent, message.session, item.position, item.token, item.key)
            self._at[agent, message.session, item.position] = self._by_key[item.key] = doubt

    def of(self, key: bytes) -> Doubt | None:
        """The latest doubt with this key."""
        return self._by_key.get(key)

    def place(self, key: bytes) -> str:
        """The position of the token with this key."""
        doubt = self.of(key)
        if doubt is None:
            return "a token that nobody doubted"
        return f"session {doubt.session} of {doubt.agent}, token at position {doubt.position}"


def evidence(
    memory: ClusterMemory, agent: str, escalation: Escalation, *, fingerprint: Fingerprint | None, spell: Spell
) -> str:
    """The evidence for or against an answer by the edge: the first unsupported draft, or the weakest support."""
    hints = escalation.hints
    if not isinstance(hints, Hints) or hints.similarity is None:
        return "the block asks for no answer of the edge"
    if fingerprint is None:
        return "neither the agent's nor the cloud's tokenizer is known"
    known = memory.evidence(agent, escalation, fingerprint.vocab_size)
    if not known:
        return "none of its drafts was doubted"
    against = [found for found in known if not found.supports]
    told = against[0] if against else min(known, key=lambda found: found.match.similarity if found.match else 0.0)
    place = f"token at position {told.position} ({spell(told.token)})"
    voters = "the nearest verified token" if hints.votes == 1 else f"the {hints.votes} nearest verified tokens"
    asked = f"similarity {hints.similarity:.6g} asked"
    if told.match is None:
        return f"{place}: {voters} are too few or do not agree; {asked}"
    words = f"{place}: {voters} at cosine {told.match.similarity:.6g}, {asked}"
    if told.match.token != told.token:
        return f"{words}, but its token is {spell(told.match.token)}"
    return f"{words}: {'near enough' if told.supports else 'too far'}"


def federation_words(then: Learned | Contribution | None, now: Learned | Contribution | None) -> tuple[str, str]:
    """Describe where two states differ; "nothing" for a state that was not sent."""
    if then is None or now is None:
        return ("nothing" if then is None else "sent"), ("nothing" if now is None else "sent")
    a, b = (_facts(state) for state in (then, now))
    differing = [name for name in {**a, **b} if not same(a.get(name), b.get(name))]
    return tuple(", ".join(f"{name} {_number(side.get(name))}" for name in differing) for side in (a, b))  # type: ignore[return-value]


_THRESHOLD_FACTS: Final = {
    "threshold": "threshold",
    "threshold's count": "count",
    "threshold's control": "control",
    "threshold's steps": "steps",
}


def _facts(state: Learned | Contribution) -> dict[str, float | None]:
    facts: dict[str, float | None] = {"round": float(state.round), "members": float(state.members)}
    if isinstance(state, Learned):
        facts["refused"] = float(state.refused)
    for pair, threshold in state.thresholds.items():
        for label, name in _THRESHOLD_FACTS.items():
            facts[f"{label} of {pair}"] = float(getattr(threshold, name))
    for measure, data in state.curves.items():
        try:
            curve = Curve.from_bytes(data)
        except ProtocolError:
            facts[f"{measure}: bytes"] = float(len(data))
            continue
        for name in _SUMS:
            column = getattr(curve, name)
            facts[f"{measure}: sum of {name}"] = float(np.sum(column))
            facts[f"{measure}: mean bin of {name}"] = float(np.sum(column * np.arange(len(column)))) / max(
                1e-300, float(np.sum(column))
            )
    return facts


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"


def plural(count: int, thing: str) -> str:
    """`1 id`, `2 ids`."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def place_of(agent: str, session: int, epoch: int, base: int) -> str:
    """Describe a block."""
    return f"session {session} of {agent}, epoch {epoch}, block at position {base}"


def verdict_words(v: Verdict) -> str:
    """Describe a verdict."""
    if v.status == "working":
        return f"working, {v.fed} ids of the prime read"
    if v.status != "settled":
        return f"{v.status} {v.reason}".rstrip()
    more = f" and {len(v.ids)} bytes of ids" if v.ids else ""
    return f"{plural(v.accepted, 'id')} stand by {v.source}{more}"
