"""What a device may keep in its next generation: the threshold and the similarity, from what it knows.

Pure functions of a `Knowledge` and the configuration. Each choice of `generation.threshold` and of
`generation.learning.objective` is a row of a table.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from fedhlm import choices
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.curve import Curve, isotonic, shrunk
from fedhlm.learning.thresholds import KEEP_NONE, harm_up_to, mean_limit, tau_of_budget, tau_of_price
from fedhlm.settings import Generation


class CurvePair(NamedTuple):
    """A device's own curve, and the larger one of it and its cluster's."""

    own: Curve
    evidence: Curve


class Knowledge(NamedTuple):
    """What a device knows when a generation begins.

    `draft` and `peers` are the curves of its own drafts and of its peers' proposals. `certificate` is that of all texts
    accounted for; None if auditing is disabled. `slack` is the factor of `edge_agent.accounts.Slack`. `published` is
    the threshold of the published rule (`paper-fl`); None before its first round. `escalation_bytes` is the mean number
    of bytes per escalated token, as measured here; 0 before the first.
    """

    draft: CurvePair
    peers: CurvePair
    certificate: Certificate | None
    slack: float
    published: float | None
    escalation_bytes: float


def tau(known: Knowledge, config: Generation) -> float:
    """The threshold on the doubt for the next generation. KEEP_NONE verifies everything."""
    return THRESHOLDS[config.threshold](known, config)


def similarity(known: Knowledge, config: Generation) -> float | None:
    """The cosine from which peers may settle a token; None: never, because there is no evidence that it is safe."""
    consensus = config.consensus
    if not choices.PEERS[config.peers].asked:
        return None
    if not (consensus.adapt and choices.THRESHOLDS[config.threshold].keeps_budget):
        return consensus.similarity
    if _overdrawn(known, config):
        return None
    m = shrunk(*known.peers, config.learning.shrinkage)
    share = tau_of_budget(known.peers.own, m, _allowed(known, config) * consensus.error_share, _delta(config))
    return None if share == KEEP_NONE else max(consensus.similarity, 1.0 - share)


def price(escalation_bytes: float, config: Generation) -> float:
    """c/w: the price of escalating a token of `escalation_bytes`, in units of a wrong token."""
    return (escalation_bytes + config.learning.round_trip_bytes) / config.learning.harm_bytes


def tau_by_price(known: Knowledge, config: Generation) -> float:
    """The threshold below which a transmission costs more than the harm that it prevents."""
    return tau_of_price(shrunk(*known.draft, config.learning.shrinkage), price(known.escalation_bytes, config))


def tau_by_budget(known: Knowledge, config: Generation) -> float:
    """The highest threshold that keeps the error within the budget, less the peers' share of it."""
    if _overdrawn(known, config):
        return KEEP_NONE
    allowed = _allowed(known, config) - _peers_part(known, config)
    return tau_of_budget(known.draft.own, shrunk(*known.draft, config.learning.shrinkage), allowed, _delta(config))


def calibrated(known: Knowledge, config: Generation) -> float:
    """The threshold that the budget, or the price of a transmission, allows (docs/algorithms.md, 4.2)."""
    return OBJECTIVES[config.learning.objective](known, config)


def _fixed(_known: Knowledge, config: Generation) -> float:
    return config.tau


def _published(known: Knowledge, config: Generation) -> float:
    return config.tau if known.published is None else known.published


def _peers_part(known: Knowledge, config: Generation) -> float:
    """The harm per token that peers may cause: the upper limit of it that is known here, within their share."""
    if (cosine := similarity(known, config)) is None:
        return 0.0
    most = _allowed(known, config) * config.consensus.error_share
    own = known.peers.own
    if not config.consensus.adapt or own.total_weight < 1.0:
        return most
    mean = harm_up_to(own, isotonic(own), max(0.0, 1.0 - cosine))
    return min(most, mean_limit(mean, own.total_weight, _delta(config)))


def _overdrawn(known: Knowledge, config: Generation) -> bool:
    """Whether R-hat exceeds the budget by more than two standard errors. While it does, everything is verified."""
    found = known.certificate
    return found is not None and found.estimate - 2.0 * found.standard_error > config.budget


def _allowed(known: Knowledge, config: Generation) -> float:
    """The harm per kept token that the curve may allow: the budget times the slack."""
    return min(1.0, config.budget * known.slack)


def _delta(config: Generation) -> float:
    return 1.0 - config.confidence


OBJECTIVES: Final[dict[str, Callable[[Knowledge, Generation], float]]] = {
    "budget": tau_by_budget,
    "price": tau_by_price,
}

THRESHOLDS: Final[dict[str, Callable[[Knowledge, Generation], float]]] = {
    "none": _fixed,
    "fixed": _fixed,
    "paper-fl": _published,
    "calibrated-fl": calibrated,
}
