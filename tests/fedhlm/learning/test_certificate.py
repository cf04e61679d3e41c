"""The certificate: supermartingales by enumeration, coverage at every look, sums of devices, states that travel."""

import itertools
import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError
from fedhlm.learning.certificate import (
    AUDIT_CHANCES,
    AUDIT_LEAST,
    SLOPES,
    Certificate,
    CertificateState,
    audit_chance,
    audit_probability,
    tail_probability,
)

UNIT = st.floats(0.0, 1.0)


def certificate(*texts: tuple[int, list[float], int, list[float] | None, float]) -> Certificate:
    known = Certificate()
    for tokens, scored, tail, audited, probability in texts:
        known.add(tokens, scored, tail, audited, probability=probability)
    return known


# Supermartingales


def law_of(text: list[float], tail: int, chance: float) -> list[tuple[float, list[bool], bool]]:
    """All outcomes of a text whose tokens are wrong independently with the given probabilities, and of its coin."""
    p = audit_probability(chance, tail)
    outcomes = []
    for wrong in itertools.product([False, True], repeat=len(text)):
        weight = math.prod(mu if w else 1.0 - mu for mu, w in zip(text, wrong, strict=True))
        coins = ((False, 1.0 - p), (True, p)) if 0.0 < p < 1.0 else ((p == 1.0, 1.0),)
        outcomes += [(weight * share, list(wrong), coin) for coin, share in coins]
    return outcomes


@given(st.lists(UNIT, min_size=1, max_size=5), st.integers(0, 5), st.floats(AUDIT_CHANCES[0], 1.0))
def test_both_processes_shrink_on_average_over_every_law_and_coin(text: list[float], tail: int, chance: float) -> None:
    """Enumerated: E[exp(-l sum mu) prod (1 + l X)] <= 1 and its mirror image, for every slope."""
    tail = min(tail, len(text))
    upper, lower = np.zeros(SLOPES.size), np.zeros(SLOPES.size)
    for weight, wrong, coin in law_of(text, tail, chance):
        harms = [float(w) for w in wrong]
        scored, rest = harms[: len(text) - tail], harms[len(text) - tail :]
        known = Certificate()
        known.add(len(text), scored, tail, rest if coin else None, probability=audit_probability(chance, tail))
        state = known.state()
        upper += weight * np.exp(np.array(state.upper) + SLOPES * sum(text))
        lower += weight * np.exp(np.array(state.lower) - SLOPES * sum(text))
    assert (upper <= 1.0 + 1e-9).all()
    assert (lower <= 1.0 + 1e-9).all()


@given(st.lists(UNIT, min_size=1, max_size=6), st.floats(AUDIT_LEAST, 1.0))
def test_the_coin_of_an_audit_biases_nothing(harms: list[float], chance: float) -> None:
    """Given the text, the factor of an audited tail is on average that of a tail that verdicts had scored."""
    count = len(harms)
    p = audit_probability(chance, count)
    plain = certificate((count, harms, 0, None, 1.0))
    audited = certificate((count, [], count, harms, p))
    missed = certificate((count, [], count, None, p))
    assert p * audited.estimate + (1.0 - p) * missed.estimate == pytest.approx(plain.estimate)
    for side in ("upper", "lower"):
        factors = [np.exp(np.array(getattr(known.state(), side))) for known in (audited, missed, plain)]
        assert p * factors[0] + (1.0 - p) * factors[1] == pytest.approx(factors[2])


def test_the_limit_is_where_the_mixture_reaches_one_over_delta() -> None:
    known = certificate((100, [1.0, 0.5, 0.0], 2, [1.0, 0.0], 0.5))
    mu = known.limit(0.95)
    weights = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    one, half = 1.0 - SLOPES, 1.0 - 0.5 * SLOPES
    tail = 1.0 - (1.0 - one) / 0.5
    assert float(weights @ (np.exp(SLOPES * 100 * mu) * one * half * tail)) == pytest.approx(20.0, rel=1e-9)


# Coverage


def live(
    rng: np.random.Generator,
    lives: int,
    looks: int,
    risk: Callable[[NDArray[np.float64], int], NDArray[np.float64]],
    *,
    tokens: int = 8,
    chance: float = 0.25,
    correlated: bool = False,
) -> tuple[float, float]:
    """How often, over lives that are looked at after every text, the truth was ever above the limit or below the floor.

    `risk` gives every life's error probability for the next text from its estimates so far.
    """
    upper, lower = np.zeros((lives, SLOPES.size)), np.zeros((lives, SLOPES.size))
    harm, mean, count = np.zeros(lives), np.zeros(lives), 0
    above, below = np.zeros(lives, bool), np.zeros(lives, bool)
    tail = 3
    p = audit_probability(chance, tail)
    weights = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    for look in range(looks):
        mu = risk(harm / max(1, count), look)  # (lives,)
        draws = rng.random((lives, tokens))
        if correlated:
            draws[:, tokens - tail :] = draws[:, [-1]]
        wrong = draws < mu[:, None]
        seen, rest = wrong[:, : tokens - tail].sum(1), wrong[:, tokens - tail :].sum(1)
        coin = rng.random(lives) < p
        for sums, slopes in ((upper, -SLOPES), (lower, SLOPES)):
            product = np.log1p(slopes)
            audited = np.log1p(np.expm1(np.outer(rest, product)) / p)
            np.add(sums, np.outer(seen, product) + np.where(coin[:, None], audited, 0.0), out=sums)
        count += tokens
        mean += tokens * mu
        harm += seen + np.where(coin, rest / p, 0.0)
        scale = SLOPES * mean[:, None]
        above |= (np.exp(upper + scale) @ weights) >= 20.0
        below |= (np.exp(lower - scale) @ weights) >= 20.0
    return float(above.mean()), float(below.mean())


@pytest.mark.parametrize("correlated", [False, True], ids=["independent", "tails wrong as a whole"])
@pytest.mark.parametrize(
    "risk",
    [
        lambda estimate, look: np.full_like(estimate, 0.02),
        lambda estimate, look: np.full_like(estimate, 0.3 if look % 2 else 0.0),
        lambda estimate, look: np.where(estimate < 0.05, 0.15, 0.0),  # raises its risk as long as nothing shows
        lambda estimate, look: np.where(estimate > 0.02, 0.2, 0.01),  # worse, the more has shown
        lambda estimate, look: np.full_like(estimate, 0.001 if look < 150 else 0.1),
    ],
    ids=["still", "leaping", "bold", "doomed", "late"],
)
def test_the_truth_is_inside_at_every_look(
    risk: Callable[[NDArray[np.float64], int], NDArray[np.float64]], correlated: bool
) -> None:
    """20,000 lives of 300 texts each: ever above the limit, or below the floor, in at most delta of them."""
    above, below = live(np.random.default_rng(1), 20_000, 300, risk, correlated=correlated)
    assert above <= 0.05
    assert below <= 0.05


def test_the_lives_of_the_test_above_are_those_of_certificates() -> None:
    """The vectorised process and the class agree on one life."""
    rng = np.random.default_rng(3)
    known = Certificate()
    upper = np.zeros(SLOPES.size)
    for _ in range(50):
        wrong = (rng.random(8) < 0.2).astype(float)
        coin = bool(rng.random() < 0.5)
        known.add(8, wrong[:5].tolist(), 3, wrong[5:].tolist() if coin else None, probability=0.6)
        upper += wrong[:5].sum() * np.log1p(-SLOPES)
        upper += np.log1p(np.expm1(wrong[5:].sum() * np.log1p(-SLOPES)) / 0.6) if coin else 0.0
    assert known.state().upper == pytest.approx(tuple(upper))


# Sums, states, ends


@given(st.lists(st.tuples(st.integers(1, 9), st.lists(UNIT, max_size=1)), max_size=6), st.integers(0, 6))
def test_certificates_add_up_to_that_of_all_texts(texts: list[tuple[int, list[float]]], cut: int) -> None:
    whole = certificate(*((n, h, 0, None, 1.0) for n, h in texts))
    both = certificate(*((n, h, 0, None, 1.0) for n, h in texts[:cut])) + certificate(
        *((n, h, 0, None, 1.0) for n, h in texts[cut:])
    )
    assert both.limit(0.95) == pytest.approx(whole.limit(0.95), abs=1e-9)
    assert both.floor(0.95) == pytest.approx(whole.floor(0.95), abs=1e-9)
    assert both.estimate == pytest.approx(whole.estimate)


@given(st.integers(1, 500), st.floats(0.5, 0.999))
def test_evidence_without_errors_lowers_the_limit_and_errors_raise_both_sides(tokens: int, confidence: float) -> None:
    clean = certificate((tokens, [], 0, None, 1.0))
    more = clean + certificate((tokens, [], 0, None, 1.0))
    worse = clean + certificate((tokens, [1.0], 0, None, 1.0))
    assert clean.floor(confidence) == 0.0
    assert more.limit(confidence) <= clean.limit(confidence) <= 1.0
    assert worse.limit(confidence) >= more.limit(confidence)
    assert worse.floor(confidence) <= worse.estimate <= worse.limit(confidence) or worse.limit(confidence) == 1.0


def test_nothing_is_promised_without_evidence() -> None:
    known = Certificate()
    known.add(0, [])
    assert (known.limit(0.95), known.floor(0.95), known.estimate, known.standard_error) == (1.0, 0.0, 0.0, 0.0)


def test_a_state_comes_back_and_so_do_the_figures() -> None:
    known = certificate((9, [1.0, 0.25], 2, [1.0, 0.0], 0.5), (4, [], 0, None, 1.0))
    again = Certificate.of(msgspec.msgpack.decode(msgspec.msgpack.encode(known.state()), type=CertificateState))
    assert again.state() == known.state()
    named = Certificate.of_figures(known.figures())
    assert named.limit(0.9) == known.limit(0.9)
    assert named.estimate == known.estimate


@pytest.mark.parametrize(
    "change",
    [
        {"upper": (0.1,) * SLOPES.size},
        {"upper": (-1.0,) * (SLOPES.size - 1)},
        {"lower": (-0.1,) * SLOPES.size},
        {"upper": (math.nan,) * SLOPES.size},
        {"lower": (math.inf,) * SLOPES.size},
        {"texts": 11.0},
    ],
)
def test_impossible_states_are_refused(change: dict[str, object]) -> None:
    state = certificate((10, [1.0], 0, None, 1.0)).state()
    with pytest.raises(ProtocolError, match="certificate"):
        Certificate.of(msgspec.structs.replace(state, **change))


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        ((1, [0.0, 0.0], 0, None, 1.0), "at most 1"),
        ((2, [], 2, [0.0], 1.0), "2 values"),
        ((2, [1.5], 0, None, 1.0), "harm"),
        ((2, [math.nan], 0, None, 1.0), "harm"),
        ((4, [], 3, None, 0.07), "probability"),
        ((4, [], 3, None, 1.1), "probability"),
    ],
)
def test_what_no_text_can_be_is_refused(
    given_: tuple[int, list[float], int, list[float] | None, float], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        certificate(given_)


def test_long_tails_are_always_audited_and_no_audit_makes_a_sum_infinite() -> None:
    assert audit_probability(AUDIT_LEAST, 0) == 0.0
    assert audit_probability(AUDIT_LEAST, 1_000) == 1.0
    for tail in range(1, 70):
        p = audit_probability(AUDIT_LEAST, tail)
        known = certificate((tail, [], tail, [1.0] * tail, p))
        assert np.isfinite(known.state().upper).all(), tail


def test_a_rarer_audit_retires_the_slopes_that_it_cannot_serve_and_no_other() -> None:
    known = certificate((100, [1.0], 0, None, 1.0))
    before = np.array(known.state().upper)
    known.add(10, [], 2, None, probability=audit_probability(AUDIT_CHANCES[1], 2))
    after = np.array(known.state().upper)
    assert (after[:2] < -1e17).all()  # slopes above the chance, although the coin did not come up
    assert np.array_equal(after[2:], before[2:])
    assert np.isfinite(after).all()
    assert 0.0 < known.limit(0.95) <= 1.0
    with_more = known + certificate((100_000, [], 0, None, 1.0))
    assert with_more.limit(0.95) < 0.01
    assert Certificate.of(with_more.state()).limit(0.95) == with_more.limit(0.95)


@given(st.floats(0.0, 0.06), st.floats(0.0, 1e7), st.floats(AUDIT_LEAST, 1.0), st.floats(0.005, 0.5))
def test_an_audit_becomes_rarer_only_where_the_limit_stays_below_the_budget(
    harm: float, tokens: float, most: float, budget: float
) -> None:
    chance = audit_chance(most, tokens, harm, budget=budget, confidence=0.95)
    assert chance in (*AUDIT_CHANCES, most)
    assert audit_chance(most, 2.0 * tokens, harm, budget=budget, confidence=0.95) <= chance
    if chance == most:
        return
    # The limit of a certificate whose wrong tokens were all audited with the chance `most`, as often as expected.
    wrong = harm * tokens * most
    upper = np.where(chance >= 1.04 * SLOPES, wrong * np.log1p(-SLOPES / most), -1e18)
    state = CertificateState(tokens, 1.0, 0.0, 0.0, tuple(upper.tolist()), (0.0,) * SLOPES.size)
    assert Certificate.of(state).limit(0.95) < budget


def test_without_evidence_audits_are_as_frequent_as_configured_and_rare_in_the_long_run() -> None:
    assert audit_chance(0.25, 0.0, 0.0, budget=0.05, confidence=0.95) == 0.25
    assert audit_chance(0.25, 1e5, 0.01, budget=0.05, confidence=0.95) == AUDIT_CHANCES[0]
    assert audit_chance(0.25, 1e9, 0.049, budget=0.05, confidence=0.95) == 0.25  # the limit is too near


@given(st.lists(st.floats(0.0, 1.0), max_size=8))
def test_one_coin_of_a_tail_is_enough(chances: list[float]) -> None:
    missed = np.prod([1.0 - chance for chance in chances])
    assert tail_probability(chances) == pytest.approx(1.0 - missed)
    assert tail_probability([*chances, 1.0]) == 1.0


def test_the_standard_error_is_that_of_texts() -> None:
    rng = np.random.default_rng(5)
    estimates, errors = [], []
    for _ in range(300):
        known = Certificate()
        for _ in range(40):
            known.add(5, [float(x) for x in rng.random(5) < 0.1])
        estimates.append(known.estimate)
        errors.append(known.standard_error)
    assert float(np.mean(errors)) == pytest.approx(float(np.std(estimates)), rel=0.15)
