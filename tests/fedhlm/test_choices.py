"""What is said of a choice is said of every choice that can be configured, and of none else."""

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import pytest

from edge_agent.gate import GATES, Settings
from edge_agent.peers import RULES
from edge_agent.pipeline import PIPELINES, Pending, PipelineLimits
from edge_agent.policy import OBJECTIVES, THRESHOLDS
from fedhlm import choices
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.learning.thresholds import OPTIMISERS
from fedhlm.protocol.fields import Source
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Generation, Learning, Pipeline


@pytest.mark.parametrize(
    ("section", "key", "tables"),
    [
        (Generation, "gate", (choices.GATES, GATES)),
        (Generation, "peers", (choices.PEERS, RULES)),
        (Generation, "threshold", (choices.THRESHOLDS, THRESHOLDS)),
        (Generation, "coupling", (COUPLINGS,)),
        (Pipeline, "kind", (choices.PIPELINES, PIPELINES)),
        (Learning, "objective", (choices.OBJECTIVES, OBJECTIVES)),
        (Learning, "optimiser", (OPTIMISERS,)),
    ],
)
def test_every_table_has_each_choice_of_the_settings(
    section: type, key: str, tables: tuple[Mapping[str, Any], ...]
) -> None:
    for table in tables:
        assert sorted(table) == sorted(get_args(get_type_hints(section)[key]))


def test_every_source_of_a_token_is_described() -> None:
    assert tuple(SOURCES) == get_args(Source)
    assert [name for name, traits in SOURCES.items() if not any(traits)] == []


@pytest.mark.parametrize("name", choices.GATES)
def test_gates_are_as_described(name: str) -> None:
    def verifies(uncertainty: float, tau: float) -> list[bool]:
        gate = GATES[name](Settings(threshold=tau, probability=0.5, seed=3))
        return [gate(uncertainty, position) for position in range(64)]

    traits = choices.GATES[name]
    assert traits.verifies_all == all(verifies(0.0, 1.0))
    assert traits.by_doubt == (all(verifies(0.6, 0.5)) and not any(verifies(0.4, 0.5)))


@pytest.mark.parametrize("name", choices.PIPELINES)
def test_pipelines_are_as_described(name: str) -> None:
    pipeline = PIPELINES[name](PipelineLimits(window=8, block=4, flush_uncertainty=1.0, flush_age_s=1.0))
    waiting = Pending(tail=4, unsent=0, unsent_age_s=0.0, uncertainty=0.0, survival=1.0, awaiting=True, ended=False)
    assert choices.PIPELINES[name].grows_trees == pipeline.grow
    assert choices.PIPELINES[name].runs_ahead == pipeline.may_draft(waiting)
