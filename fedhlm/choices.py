"""The choices that make up a preset, by their names in the configuration, and the properties of each.

Code that depends on a property of a choice looks it up here and compares no names. The behaviour of the choices is in
the tables of `edge_agent.gate`, `edge_agent.peers`, `edge_agent.policy`, `edge_agent.pipeline` and
`fedhlm.decoding.couplings`.
"""

from typing import Final, NamedTuple


class GateTraits(NamedTuple):
    """Properties of a gate.

    Attributes:
        verifies_all: every token is verified, and none is kept.
        by_doubt: a token is verified iff its doubt is above tau.
        alone: no token is verified, so that a text needs no broker.
    """

    verifies_all: bool = False
    by_doubt: bool = False
    alone: bool = False


class PeerTraits(NamedTuple):
    """Properties of a choice of peers.

    Attributes:
        asked: peers may settle a token, or propose another one.
    """

    asked: bool = True


class ThresholdTraits(NamedTuple):
    """Properties of a choice of threshold.

    Attributes:
        learns: devices contribute to a federation, and tau follows from what it knows.
        descends: each device learns its own tau by gradient steps (FedHLM).
        keeps_budget: tau follows from learnt curves, so that the harm stays within the budget.
    """

    learns: bool = False
    descends: bool = False
    keeps_budget: bool = False


class ObjectiveTraits(NamedTuple):
    """Properties of an objective.

    Attributes:
        bounded: the harm stays within the budget. Otherwise it depends on the price of harm.
    """

    bounded: bool = False


class PipelineTraits(NamedTuple):
    """Properties of a pipeline.

    Attributes:
        runs_ahead: the device goes on drafting, within the window, while it waits for verdicts.
        grows_trees: a draft is a tree.
        cloud_writes: the device drafts nothing, and sends its prompt up whatever the gate is.
    """

    runs_ahead: bool = False
    grows_trees: bool = False
    cloud_writes: bool = False


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
    "remote": PipelineTraits(cloud_writes=True),
    "tree": PipelineTraits(grows_trees=True),
}

# Who can read a text besides its device and its client, from nobody outwards.
REACHES: Final = ("nobody", "edge and cloud", "edge, cloud and peers")


def reach(gate: str, peers: str, pipeline: str) -> int:
    """How far these choices let a text go, as an index into REACHES."""
    if PEERS[peers].asked:
        return 2
    return 0 if GATES[gate].alone and not PIPELINES[pipeline].cloud_writes else 1
