"""A party sends at its rate, with a burst, whatever others send."""

import random

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.rates import BURST_S, NAMES_MAX, REFUSALS_S, Allowance, PartyRates, UnreadLimit


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


def test_an_idle_party_saves_up_one_burst_and_no_more() -> None:
    rates = PartyRates(10.0)
    assert rates.allow("a", 1.0, 0.0)
    after_an_hour = [rates.allow("a", 1.0, 3_600.0) for _ in range(100)]
    assert sum(after_an_hour) == 10.0 * BURST_S


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


# What is not even read


@given(
    st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(1, 5_000)), max_size=200),
    st.floats(1.0, 50.0),
    st.floats(100.0, 5_000.0),
)
def test_of_a_party_that_keeps_to_its_rates_everything_is_read(
    sent: list[tuple[float, int]], units_s: float, bytes_s: float
) -> None:
    now_s = 0.0
    allowance = Allowance(units_s, bytes_s)
    limit = UnreadLimit(allowance, lambda name: name, lambda: now_s)
    for wait_s, size in sent:
        now_s += wait_s
        shed = limit.sheds(b"a", size)
        if allowance.exceeds("a", 1.0, size, now_s):
            return
        assert not shed


def test_of_a_flood_little_more_than_the_allowance_is_read() -> None:
    now_s = 0.0
    limit = UnreadLimit(Allowance(10.0, 0.0), lambda name: name if name != "free" else "", lambda: now_s)
    read = 0
    for step in range(10_000):
        now_s = step / 1_000
        read += not limit.sheds(b"flood", 100)
        assert not limit.sheds(b"free", 100)
        assert step % 100 or not limit.sheds(b"honest", 100)
    most = (10.0 + REFUSALS_S) * (10.0 + BURST_S)
    assert 0.9 * most < read <= most
    assert limit.unread == 10_000 - read


def test_without_limits_everything_is_read() -> None:
    limit = UnreadLimit(Allowance(0.0, 0.0), lambda name: name, lambda: 0.0)
    assert not any(limit.sheds(b"a", 10**6) for _ in range(10_000))


def test_invented_topics_take_little_memory() -> None:
    limit = UnreadLimit(Allowance(1.0, 0.0), lambda _name: "a", lambda: 0.0)
    for number in range(NAMES_MAX + 10):
        limit.sheds(str(number).encode(), 1)
    assert len(limit._owners) <= NAMES_MAX
    assert not limit.sheds(b"\xff\xfe", 1) or limit.unread
