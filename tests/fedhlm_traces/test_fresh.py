"""A fresh recording of the demo's fleet, made now, is decided again without a difference. `fresh` makes as many as one wants."""

import logging

import pytest

from fedhlm.telemetry import silenced
from tests.fedhlm_traces import fresh


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["budget", "fedhlm"])
def test_a_fresh_recording_is_decided_again_without_a_difference(preset: str) -> None:
    with silenced():
        answered, differing = fresh.checked(preset, seed=0, requests=8, tokens=8)
    assert answered == 8
    assert differing == ""
    assert logging.root.manager.disable == logging.NOTSET
