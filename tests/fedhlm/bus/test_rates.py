"""A party sends at its rate, with a burst, whatever others send."""

import random

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.rates import BURST_S, NAMES_MAX, PartyRates


@given(st.lists(st.tuples(st.floats(0.0, 0.5), st.floats(0.1, 30.0)), max_size=200), st.floats(1.0, 50.0))
def test_nobody_sends_more_than_its_rate_and_one_burst(sent: list[tuple[float, float]], per_s: float) -> None:
    rates, now_s, allowed = PartyRates(per_s), 0.0, 0.0
    for wait_s, units in sent:
        now_s += wait_s
        if rates.allow("a", units, now_s):
            # A message larger than a whole bucket empties it.
            allowed += min(units, per_s * BURST_S)
        assert allowed <= per_s * (now_s + BURST_S) + 1e-6


def test_a_party_within_its_rate_is_never_refused_beside_a_flood() -> None:
    rates, rng = PartyRates(10.0), random.Random(1)
    refused = 0
    for step in range(20_000):
        now_s = step / 1_000
        refused += not rates.allow("flood", 1.0, now_s)
        if step % 110 == 0:
            assert rates.allow("honest", rng.uniform(0.5, 1.0), now_s)
    assert refused > 19_000


def test_a_clock_that_goes_back_gives_nothing() -> None:
    rates = PartyRates(1.0)
    assert all(rates.allow("a", 1.0, 100.0) for _ in range(int(BURST_S)))
    assert not rates.allow("a", 1.0, 0.0)
    assert not rates.allow("a", 1.0, 0.5)


def test_without_a_limit_everything_passes_and_nothing_is_remembered() -> None:
    rates = PartyRates(0.0)
    assert all(rates.allow("a", 1e9, 0.0) for _ in range(10))
    assert len(rates) == 0


def test_names_are_bounded() -> None:
    rates = PartyRates(1.0)
    for name in range(NAMES_MAX + 10):
        rates.allow(str(name), 1.0, 0.0)
    assert len(rates) == NAMES_MAX
