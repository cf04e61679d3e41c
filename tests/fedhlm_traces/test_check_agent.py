"""An agent's journal is decided again alike by the code that made it, whatever its messages' headers were."""

import pytest

from fedhlm.config import presets
from fedhlm_traces.check.agent import check_agent
from fedhlm_traces.check.divergence import plain
from fedhlm_traces.check.journals import lives
from tests.fedhlm_traces.told import AGENTS, told


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("seed", [11, 12])
def test_a_fresh_recording_is_decided_the_same(preset: str, seed: int) -> None:
    agents = [life for life in lives(told(preset, seed, prompts=4, journal=True).records) if life.part == "agent"]
    assert len(agents) == len(AGENTS)
    for life in agents:
        outcome = check_agent(life)
        assert not outcome.divergences, plain(outcome.divergences)
        assert not outcome.skipped
        assert outcome.decisions > 10
