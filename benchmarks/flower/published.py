"""FedHLM's threshold rule (arXiv 2507.00082, equations 4 to 8) by itself, in plain Python.

It shares no code with the project, and needs nothing but a Python, so that it can be the peer's.
"""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Pair = tuple[float, float]
"""A draft's doubt u and its rejection probability beta."""


class Rule(NamedTuple):
    """The constants: steepness and weight of (4) and (5), and a learning rate that falls with the round."""

    gamma: float
    learning_rate: float
    decay: float
    regularisation: float


class Sent(NamedTuple):
    """What a client sends after a round: its threshold, and n_k, the number of tokens that it transmitted."""

    threshold: float
    tokens: int


@cache
def read(observations: Path) -> dict[str, Any]:
    """The file of observations. Each of Flower's workers reads it by itself, once."""
    found: dict[str, Any] = json.loads(observations.read_text("utf-8"))
    return found


def gradient(rule: Rule, pairs: Sequence[Pair], tau: float) -> float:
    """The derivative of the loss by tau, equation (5)."""
    total = 0.0
    for u, beta in pairs:
        s = 1.0 / (1.0 + math.exp(-rule.gamma * (u - tau)))
        total += s * (1.0 - s) * ((1.0 - beta) ** 2 + rule.regularisation)
    return -rule.gamma * total


def client_round(rule: Rule, pairs: Sequence[Pair], tau: float, number: int) -> Sent:
    """Equation (6), on the tokens that are transmitted under the common threshold; `number` counts rounds from 0."""
    sent = [pair for pair in pairs if pair[0] > tau]
    if not sent:
        return Sent(tau, 0)
    rate = rule.learning_rate / (1.0 + rule.decay * number)
    return Sent(min(1.0, max(0.0, tau - rate * gradient(rule, sent, tau))), len(sent))


def server_round(clusters: Sequence[Sequence[Sent]], tau: float) -> float:
    """Equation (7) in each cluster that sent a token, then (8) over these; `tau` where none did."""
    means = []
    for cluster in clusters:
        tokens = sum(sent.tokens for sent in cluster)
        if tokens:
            means.append(sum(sent.tokens * sent.threshold for sent in cluster) / tokens)
    return sum(means) / len(means) if means else tau


def trajectory(rule: Rule, rounds: Sequence[Sequence[Sequence[Pair]]], clusters: int, tau: float) -> list[float]:
    """The threshold after each round; `rounds[r][k]` are the pairs of client k, of cluster k modulo their number."""
    found = []
    for number, clients in enumerate(rounds):
        sent = [client_round(rule, pairs, tau, number) for pairs in clients]
        tau = server_round([sent[c::clusters] for c in range(clusters)], tau)
        found.append(tau)
    return found
