"""The choices that a preset is made of, by their names in the configuration, and what is true of each.

Whoever must know what a choice implies looks it up here and compares no names. What a choice does is in the tables of those
who do it: `edge_agent.gate`, `edge_agent.peers`, `edge_agent.learner`, `edge_agent.pipeline`, `fedhlm.decoding.couplings`.
"""

from typing import Final, NamedTuple


class GateTraits(NamedTuple):
    """`verifies_all`: every token is verified, none is kept on the device's word. `by_doubt`: iff its uncertainty is above tau.

    `alone`: nothing is ever asked of anybody, so that a text needs no broker.
    """

    verifies_all: bool = False
    by_doubt: bool = False
    alone: bool = False


class PeerTraits(NamedTuple):
    """`asked`: peers may settle a token, or propose another one."""

    asked: bool = True


class ThresholdTraits(NamedTuple):
    """`learns`: devices contribute to a federation, and tau follows from what it knows. `descends`: by gradient steps of
    each device's own tau (FedHLM). `keeps_budget`: from calibrated curves, so that the error stays below the budget."""

    learns: bool = False
    descends: bool = False
    keeps_budget: bool = False


class ObjectiveTraits(NamedTuple):
    """`bounded`: the error stays below the budget; else it is what its price makes of it."""

    bounded: bool = False


class PipelineTraits(NamedTuple):
    """`runs_ahead`: drafting goes on within the window while verdicts are under way. `grows_trees`: a draft is a tree."""

    runs_ahead: bool = False
    grows_trees: bool = False


GATES: Final[dict[str, GateTraits]] = {
    "always": GateTraits(verifies_all=True),
    "never": GateTraits(alone=True),
    "random": GateTraits(),
    "threshold": GateTraits(by_doubt=True),
}

PEERS: Final[dict[str, PeerTraits]] = {
    "none": PeerTraits(asked=False),
    "centroid": PeerTraits(),
    "neighbour": PeerTraits(),
}

THRESHOLDS: Final[dict[str, ThresholdTraits]] = {
    "none": ThresholdTraits(),
    "fixed": ThresholdTraits(),
    "paper-fl": ThresholdTraits(learns=True, descends=True),
    "calibrated-fl": ThresholdTraits(learns=True, keeps_budget=True),
}

OBJECTIVES: Final[dict[str, ObjectiveTraits]] = {
    "budget": ObjectiveTraits(bounded=True),
    "price": ObjectiveTraits(),
}

PIPELINES: Final[dict[str, PipelineTraits]] = {
    "blocking": PipelineTraits(),
    "async": PipelineTraits(runs_ahead=True),
    "remote": PipelineTraits(),
    "tree": PipelineTraits(grows_trees=True),
}
