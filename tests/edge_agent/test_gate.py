"""Gates: where the border lies, and that every purpose draws its own random numbers."""

import ast
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.gate import GATES, Settings
from fedhlm.decoding import sampling

ROOT = Path(__file__).parents[2]
UNIT = st.floats(0.0, 1.0)


@given(UNIT, st.integers(0, 1_000))
def test_a_draft_as_doubtful_as_the_threshold_is_kept(tau: float, position: int) -> None:
    """u <= tau stays, u > tau goes up: thresholds are the upper edges of bins that are closed on the right."""
    verifies = GATES["threshold"](Settings(threshold=tau, probability=0.0, seed=1))
    assert not verifies(tau, position)
    assert not verifies(float(np.nextafter(tau, -1.0)), position)
    assert verifies(float(np.nextafter(tau, 2.0)), position)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.85, 1.0])
def test_the_random_gate_verifies_with_its_probability(probability: float) -> None:
    verifies = GATES["random"](Settings(threshold=0.0, probability=probability, seed=5))
    count = 4_000
    share = sum(verifies(0.5, position) for position in range(count)) / count
    assert share == pytest.approx(probability, abs=4.0 * (probability * (1.0 - probability) / count) ** 0.5 + 1e-12)


@given(UNIT, UNIT, st.integers(0, 2**62), st.integers(0, 1_000))
def test_what_a_random_gate_verifies_it_verifies_at_every_higher_probability(
    low: float, high: float, seed: int, position: int
) -> None:
    low, high = sorted((low, high))
    verified = [GATES["random"](Settings(0.0, p, seed))(0.5, position) for p in (low, high)]
    assert verified in ([False, False], [False, True], [True, True])


def test_the_fixed_gates() -> None:
    settings = Settings(threshold=0.5, probability=0.5, seed=1)
    for u in (0.0, 0.5, 1.0):
        assert GATES["always"](settings)(u, 0)
        assert not GATES["never"](settings)(u, 0)


def streams() -> dict[str, int]:
    return {name: getattr(sampling, name) for name in dir(sampling) if name == "_GUMBEL" or name.endswith("_STREAM")}


def test_every_purpose_has_a_stream_of_its_own() -> None:
    numbers = streams()
    assert len(numbers) >= 7
    assert len(set(numbers.values())) == len(numbers)


def test_streams_of_one_position_are_independent() -> None:
    """Draws of two purposes at the same positions neither repeat nor correlate."""
    draws = {
        name: np.array([sampling.uniform(7, position, stream) for position in range(400)])
        for name, stream in streams().items()
    }
    names = sorted(draws)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert abs(np.corrcoef(draws[a], draws[b])[0, 1]) < 0.25, (a, b)


def test_no_two_purposes_name_the_same_stream() -> None:
    """Each stream is asked for by one module of the product; a second user would repeat the first one's numbers."""
    users: dict[str, set[str]] = {}
    for package in ("fedhlm", "edge_agent", "edge_broker", "cloud_verifier"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    for argument in node.args:
                        if isinstance(argument, ast.Name) and argument.id.endswith("_STREAM"):
                            users.setdefault(argument.id, set()).add(path.relative_to(ROOT).as_posix())
    assert users.keys() >= {"GATE_STREAM", "DOUBT_STREAM", "AUDIT_STREAM", "ACCEPT_STREAM", "RESAMPLE_STREAM"}
    shared = {name: sorted(where) for name, where in users.items() if len(where) > 1}
    assert not shared


def test_the_gate_and_the_verifier_toss_different_coins() -> None:
    """The gate's coin, found by bisection from outside, is none of the numbers that other purposes draw there."""
    for position in range(5):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2.0
            verifies = GATES["random"](Settings(0.0, middle, 9))(0.5, position)
            low, high = (low, middle) if verifies else (middle, high)
        near = Counter(
            name for name, stream in streams().items() if abs(sampling.uniform(9, position, stream) - high) < 1e-9
        )
        assert set(near) == {"GATE_STREAM"}
