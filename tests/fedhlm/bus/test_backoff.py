"""Delays between attempts: jitter within bounds, and two of one name that do not fight for ever."""

import random

import pytest

from fedhlm.bus.backoff import BASE_S, EVIDENT, STABLE_S, SUSPICIOUS, YIELD_BASE_S, YIELD_CAP_S, Backoff


def test_failures_double_the_bound_and_a_stable_link_resets_it() -> None:
    backoff = Backoff(random.Random(1), cap_s=4.0)
    for failures in range(1, 12):
        assert 0.0 <= backoff.failed().seconds <= min(4.0, BASE_S * 2**failures)
    assert backoff.broken(STABLE_S).seconds <= BASE_S


@pytest.mark.parametrize("told", [True, False])
def test_two_of_one_name_take_turns_more_and_more_seldom(told: bool) -> None:
    """Each connects as soon as its wait is over, which ends the other's link; what counts is how often that happens."""
    sides = [Backoff(random.Random(1)), Backoff(random.Random(2))]
    now_s, holder, since_s = 0.0, 0, 0.0
    back_s = [0.0, 0.5]  # when each connects
    changes: list[float] = []
    while now_s < 24 * 3_600.0:
        now_s = back_s[1 - holder]
        back_s[holder] = now_s + sides[holder].broken(now_s - since_s, taken_over=told, abrupt=not told).seconds
        holder, since_s = 1 - holder, now_s
        changes.append(now_s)
    first_hour = sum(t < 3_600.0 for t in changes)
    last_hour = sum(t > 23 * 3_600.0 for t in changes)
    assert first_hour < 25
    assert last_hour <= 3_600.0 / (YIELD_CAP_S / 2.0) + 1


def test_the_first_wait_leaves_time_for_a_guest_and_a_held_place_forgets_the_fight() -> None:
    backoff = Backoff(random.Random(3))
    for n in range(5):
        delay_s = backoff.broken(0.1, taken_over=True).seconds
        assert YIELD_BASE_S * 2**n / 2.0 <= delay_s <= YIELD_BASE_S * 2**n
    assert backoff.broken(3_600.0, taken_over=True).seconds <= YIELD_BASE_S


def test_a_broker_that_hangs_up_without_a_reason_again_and_again_has_another_client_of_our_id() -> None:
    backoff = Backoff(random.Random(4))
    for count in range(1, 8):
        wait = backoff.broken(3_600.0 if count == 1 else 0.2, abrupt=True)
        assert wait.rival == ("perhaps" if count >= SUSPICIOUS else "no")
        assert (wait.seconds >= YIELD_BASE_S / 2.0) == (count >= EVIDENT)


def test_a_broker_that_restarts_is_no_rival() -> None:
    backoff = Backoff(random.Random(5))
    for _ in range(9):
        assert backoff.broken(0.2, abrupt=True).rival == "no"
        assert backoff.failed().rival == "no"
