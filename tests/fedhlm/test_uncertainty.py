"""Closed-form uncertainty equals the mean of the published sampling form."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.uncertainty import TEMPERATURE_MAX, closed_form


def test_closed_form_is_the_mean_of_k_sample_disagreement() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=12) * 2.0
    token = int(np.argmax(logits))
    temperatures = TEMPERATURE_MAX * (1.0 - rng.random(60_000))
    scaled = logits[None, :] / temperatures[:, None] + rng.gumbel(size=(60_000, 12))
    disagreement = float((scaled.argmax(axis=1) != token).mean())
    assert closed_form(logits, token) == pytest.approx(disagreement, abs=0.01)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.data())
def test_it_is_a_share_and_falls_with_the_logit(values: list[float], data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    logits = np.array(values)
    u = closed_form(logits, token)
    raised = logits.copy()
    raised[token] += 1.0
    assert 0.0 <= closed_form(raised, token) <= u + 1e-6 <= 1.0 + 1e-6


def test_certain_and_hopeless_tokens() -> None:
    logits = np.array([200.0, 0.0, 0.0])
    assert closed_form(logits, 0) == pytest.approx(0.0, abs=1e-9)
    assert closed_form(logits, 1) == pytest.approx(1.0, abs=1e-9)
