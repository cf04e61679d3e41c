"""Every coupling keeps its promise about the target law: exact ones exactly, the biased one within its bound."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.decoding.couplings import (
    COUPLINGS,
    PUBLISHED_K,
    Draft,
    acceptance,
    rejection_probability,
    residual,
    split_laws,
)
from fedhlm.decoding.laws import decode_full, decode_lattice, decode_top_k
from fedhlm.decoding.sampling import law
from fedhlm.errors import ProtocolError
from fedhlm.protocol.messages import Sampling

V = 7
DRAWS = 5_000
CHI2_DF6_1E5 = 33.1  # a chi-square with 6 degrees of freedom exceeds this once in 100,000 runs
NAMES = sorted(COUPLINGS)
EXACT = ["gumbel", "full", "lattice"]
TRAVELLING: dict[str, Callable[[bytes, int], NDArray[np.float64]]] = {
    "full": decode_full,
    "lattice": lambda data, size: decode_lattice(data, size, 30, 100).dense(size),
    "published-cu": decode_top_k,
    "published-cu-online": decode_top_k,
}
PUBLISHED = ["published-cu", "published-cu-online"]


def logits(seed: int, size: int = V, spread: float = 1.5) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=size) * spread


def output_law(
    p: NDArray[np.float64], *, drawn: NDArray[np.float64], tested: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The emitted token's law by enumeration: drafts of law `drawn`, tested and resampled against `tested`."""
    kept = drawn * [acceptance(float(b), float(a)) for a, b in zip(p, tested, strict=True)]
    rest = residual(p, tested)
    return np.asarray(kept + (1.0 - kept.sum()) * rest / rest.sum()) if rest.sum() > 0.0 else kept


def tv(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return 0.5 * float(np.abs(a - b).sum())


def emitted(
    name: str, q: NDArray[np.float64], p: NDArray[np.float64], *, draft_there: bool = True
) -> NDArray[np.float64]:
    """How often each token came out; shape (len(p),)."""
    coupling, counts = COUPLINGS[name], np.zeros(len(p))
    sampling = Sampling(seed=11, temperature=0.9, coupling=name)
    for position in range(DRAWS):
        draft = coupling.draft(q, sampling, position)
        given = (draft.token, draft.law) if draft_there else (None, b"")
        counts[coupling.settle(p, sampling, position, *given)] += 1
    return counts


def chi_square(counts: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(((counts - expected * DRAWS) ** 2 / (expected * DRAWS)).sum())


@pytest.mark.parametrize(
    ("name", "draft_there"), [*((n, True) for n in EXACT), *((n, False) for n in NAMES if n != "greedy")]
)
def test_output_follows_the_target_law(name: str, draft_there: bool) -> None:
    counts = emitted(name, logits(1), logits(2), draft_there=draft_there)
    assert chi_square(counts, law(logits(2), Sampling(seed=0, temperature=0.9))) < CHI2_DF6_1E5


@pytest.mark.parametrize("name", ["full", "lattice"])
def test_output_follows_the_target_law_where_the_draft_law_is_cut(name: str) -> None:
    """60 tokens, of which a lattice law keeps 30; the target's tokens are pooled in seven to test them."""
    z, target = logits(5, 60, 3.0), logits(6, 60, 1.0)
    counts = emitted(name, z, target)
    groups = np.arange(60) % V
    expected = np.bincount(groups, weights=law(target, Sampling(seed=0, temperature=0.9)))
    assert chi_square(np.bincount(groups, weights=counts), expected) < CHI2_DF6_1E5


@given(
    seed=st.integers(0, 10_000), size=st.integers(1, 80), spread=st.floats(0.0, 4.0), temperature=st.floats(0.1, 2.0)
)
@pytest.mark.parametrize("name", list(TRAVELLING))
def test_a_draft_drawn_from_the_law_that_travels_is_exact(
    name: str, seed: int, size: int, spread: float, temperature: float
) -> None:
    """Oracle 9: quantise, then sample. True of CU-HLM's law too, had it been drawn from."""
    sampling = Sampling(seed=seed, temperature=temperature, coupling=name)
    draft = COUPLINGS[name].draft(logits(seed, size, spread), sampling, 3)
    x = TRAVELLING[name](draft.law, size)
    p = law(logits(seed + 1, size, spread), sampling)
    assert output_law(p, drawn=x, tested=x) == pytest.approx(p, abs=1e-12)


@given(
    seed=st.integers(0, 10_000), size=st.integers(1, 200), spread=st.floats(0.0, 4.0), top_p=st.sampled_from([0.5, 1.0])
)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cu_stays_within_its_bound(name: str, seed: int, size: int, spread: float, top_p: float) -> None:
    """Oracle 9: sample, then quantise. TV(out, p) <= TV(q, x-hat)."""
    sampling = Sampling(seed=seed, temperature=1.0, top_p=top_p, coupling=name)
    z = logits(seed, size, spread)
    draft = COUPLINGS[name].draft(z, sampling, 3)
    q, x = law(z, sampling), decode_top_k(draft.law, size)
    p = law(logits(seed + 1, size, spread), sampling)
    assert draft.prob == q[draft.token]
    assert tv(output_law(p, drawn=q, tested=x), p) <= tv(q, x) + 1e-12


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_cu_is_biased(name: str) -> None:
    sampling = Sampling(seed=1, temperature=1.0, coupling=name)
    z, target = logits(1, 200, 1.5), logits(2, 200, 1.5)
    q, p = law(z, sampling), law(target, sampling)
    x = decode_top_k(COUPLINGS[name].draft(z, sampling, 0).law, 200)
    assert 0.005 < tv(output_law(p, drawn=q, tested=x), p) <= tv(q, x)


@pytest.mark.parametrize("name", list(TRAVELLING))
def test_what_settle_does_is_what_was_enumerated(name: str) -> None:
    """The running code against the enumeration, with the law of the draft that the coupling promises."""
    z, target = logits(8, V, 3.0), logits(9)
    sampling = Sampling(seed=0, temperature=0.9, coupling=name)
    x = TRAVELLING[name](COUPLINGS[name].draft(z, sampling, 0).law, V)
    drawn = law(z, sampling) if name in PUBLISHED else x
    if name == "published-cu-online":  # k follows the draft, and with it what the draft is tested against
        laws = {COUPLINGS[name].draft(z, sampling, position).law for position in range(200)}
        assert len(laws) == 1
    counts = emitted(name, z, target)
    assert chi_square(counts, output_law(law(target, sampling), drawn=drawn, tested=x)) < CHI2_DF6_1E5


def test_the_offline_k_is_thirty_or_the_vocabulary() -> None:
    for size in (1, 2, PUBLISHED_K, PUBLISHED_K + 1, 500):
        data = COUPLINGS["published-cu"].draft(logits(1, size), Sampling(seed=1), 0).law
        assert int.from_bytes(data[:2], "little") == min(size, PUBLISHED_K)


def test_the_online_k_follows_the_law() -> None:
    def k_of(spread: float) -> int:
        data = COUPLINGS["published-cu-online"].draft(logits(1, 500, spread), Sampling(seed=1), 0).law
        return int.from_bytes(data[:2], "little")

    assert k_of(0.0) == 1
    assert k_of(8.0) < k_of(3.0) < 500
    assert k_of(3.0) > 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 30, 31, 300])
@pytest.mark.parametrize("spread", [0.0, 1.0, 200.0])
def test_even_and_certain_laws_of_any_vocabulary(name: str, size: int, spread: float) -> None:
    """Oracle 6: k = V, q(S) = 1, and the law with no favourite."""
    coupling = COUPLINGS[name]
    sampling = Sampling(seed=3, temperature=1.0, coupling=name)
    z = logits(4, size, spread)
    for position in range(10):
        draft = coupling.draft(z, sampling, position)
        assert 0 <= draft.token < size
        assert 0.0 < draft.prob <= 1.0
        [part] = split_laws(coupling, draft.law, 1, size)
        assert 0 <= coupling.settle(logits(5, size, spread), sampling, position, draft.token, part) < size


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1_000), top_p=st.floats(0.05, 1.0), top_k=st.integers(1, 40), min_p=st.floats(0.001, 1.0))
def test_a_token_that_the_target_cannot_emit_is_not_emitted(
    name: str, seed: int, top_p: float, top_k: int, min_p: float
) -> None:
    sampling = Sampling(seed, 1.0, top_p, name, top_k, min_p)
    target = logits(seed + 1, 40)
    draft = COUPLINGS[name].draft(logits(seed, 40), sampling, 2)
    assert law(target, sampling)[COUPLINGS[name].settle(target, sampling, 2, draft.token, draft.law)] > 0.0


def test_gumbel_drafts_agree_at_least_as_often_as_the_bound() -> None:
    q, p = logits(1), logits(2)
    sampling = [Sampling(seed=s) for s in range(4_000)]
    coupling = COUPLINGS["gumbel"]
    hits = sum(coupling.draft(q, s, 0).token == coupling.settle(p, s, 0, None, b"") for s in sampling)
    apart = tv(law(q, sampling[0]), law(p, sampling[0]))
    assert hits / len(sampling) >= (1 - apart) / (1 + apart) - 0.03


@pytest.mark.parametrize("name", NAMES)
def test_temperature_zero_emits_the_likeliest_token(name: str) -> None:
    q, p = logits(3), logits(4)
    sampling = Sampling(seed=5, temperature=0.0, coupling=name)
    draft = COUPLINGS[name].draft(q, sampling, 9)
    assert draft.token == int(np.argmax(q))
    assert COUPLINGS[name].settle(p, sampling, 9, draft.token, draft.law) == int(np.argmax(p))


@pytest.mark.parametrize("name", ["gumbel", "greedy"])
@given(seed=st.integers(0, 1_000), proposal=st.integers(0, V - 1))
def test_shared_couplings_emit_the_same_whatever_was_proposed(name: str, seed: int, proposal: int) -> None:
    coupling = COUPLINGS[name]
    assert coupling.shared
    sampling = Sampling(seed=seed, temperature=0.8, coupling=name)
    p = logits(seed)
    assert coupling.settle(p, sampling, 4, proposal, b"") == coupling.settle(p, sampling, 4, None, b"")


@pytest.mark.parametrize("name", list(TRAVELLING))
def test_other_couplings_emit_what_the_draft_makes_of_it(name: str) -> None:
    """One seed and target, several drafts, several tokens: none may stand in for another."""
    coupling = COUPLINGS[name]
    assert not coupling.shared
    sampling = Sampling(seed=1, temperature=1.0, coupling=name)
    data = coupling.draft(np.zeros(V), sampling, 4).law
    assert len({coupling.settle(np.zeros(V), sampling, 4, proposal, data) for proposal in range(V)}) > 1


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.booleans())
@pytest.mark.parametrize("name", NAMES)
def test_harm_is_the_mismatch_or_beta(name: str, draft_prob: float, target_prob: float, missed: bool) -> None:
    coupling = COUPLINGS[name]
    harm = coupling.harm(draft_prob, target_prob, missed)
    assert 0.0 <= harm <= 1.0
    assert harm == (float(missed) if coupling.shared else rejection_probability(draft_prob, target_prob))


@given(seed=st.integers(0, 10_000), size=st.integers(1, 30))
def test_the_expected_harm_of_a_skip_is_the_distance_it_makes(seed: int, size: int) -> None:
    """Literature 6.3, at one step and for any gate: TV(out, p) = E[(1 - g) beta]."""
    rng = np.random.default_rng(seed)
    q, p = (law(logits(seed + i, size), Sampling(seed=0)) for i in (0, 1))
    verified = rng.random(size)  # (V,) probability that this draft is verified
    kept = q * [acceptance(float(b), float(a)) for a, b in zip(p, q, strict=True)]
    rest = residual(p, q)
    rejected = float((verified * (q - kept)).sum())
    out = q * (1.0 - verified) + verified * kept + (rejected * rest / rest.sum() if rest.sum() > 0.0 else 0.0)
    harm = [COUPLINGS["lattice"].harm(float(b), float(a), False) for a, b in zip(p, q, strict=True)]
    assert tv(out, p) == pytest.approx(float((q * (1.0 - verified) * harm).sum()), abs=1e-12)


def test_rejection_probability_is_equation_three() -> None:
    assert rejection_probability(0.5, 0.25) == 0.5
    assert rejection_probability(0.25, 0.5) == 0.0
    assert rejection_probability(0.0, 0.5) == 0.0


def test_acceptance_of_a_draft_that_its_law_excludes() -> None:
    assert acceptance(0.0, 0.25) == 1.0
    assert acceptance(0.0, 0.0) == 0.0
    assert acceptance(0.5, 0.0) == 0.0


def drafts_of(name: str, count: int, size: int) -> list[Draft]:
    sampling = Sampling(seed=1, coupling=name)
    return [COUPLINGS[name].draft(logits(i, size, 0.5 + i), sampling, i) for i in range(count)]


@pytest.mark.parametrize("name", NAMES)
@given(count=st.integers(0, 6), size=st.integers(1, 50))
def test_laws_are_split_where_they_were_joined(name: str, count: int, size: int) -> None:
    parts = [d.law for d in drafts_of(name, count, size)]
    assert split_laws(COUPLINGS[name], b"".join(parts), count, size) == parts


@pytest.mark.parametrize("name", list(TRAVELLING))
@given(cut=st.integers(1, 10_000), count=st.integers(1, 4))
def test_cut_and_lengthened_laws_are_refused(name: str, cut: int, count: int) -> None:
    laws = b"".join(d.law for d in drafts_of(name, count, 40))
    for wrong in (laws[: -(1 + cut % len(laws))], laws + bytes(cut % 7 + 1)):
        with pytest.raises(ProtocolError, match=rf"escalation\.laws must be .*got {len(wrong)}"):
            split_laws(COUPLINGS[name], wrong, count, 40)


@pytest.mark.parametrize("name", ["gumbel", "greedy"])
def test_laws_are_refused_where_none_travels(name: str) -> None:
    with pytest.raises(ProtocolError, match=r"escalation\.laws must be 0 bytes for 3 drafts \(got 1\)"):
        split_laws(COUPLINGS[name], b"x", 3, 40)


@pytest.mark.parametrize("name", list(TRAVELLING))
def test_a_law_of_the_right_size_that_is_none_is_refused(name: str) -> None:
    """What passes here is settled later, among other sessions' blocks: it must not fail there."""
    size = 40
    good = drafts_of(name, 1, size)[0].law
    bad = good[:2] + b"\xff" * (len(good) - 2) if name in PUBLISHED else b"\xff" * len(good)
    with pytest.raises(ProtocolError, match="; draft 1: "):
        split_laws(COUPLINGS[name], good + bad, 2, size)


@pytest.mark.parametrize("name", NAMES)
@given(laws=st.binary(max_size=80), size=st.integers(1, 40))
@example(laws=b"\x01\x7c", size=1)  # a signalling NaN at 16 bits
def test_any_bytes_that_split_can_be_settled(name: str, laws: bytes, size: int) -> None:
    coupling = COUPLINGS[name]
    try:
        [part] = split_laws(coupling, laws, 1, size)
    except ProtocolError:
        return
    sampling = Sampling(seed=1, coupling=name)
    for token in (0, size - 1):
        assert 0 <= coupling.settle(logits(1, size), sampling, 1, token, part) < size


@given(st.integers(0, 2**31), st.floats(0.2, 3.0))
def test_a_greedy_draft_reports_the_slms_own_probability(seed: int, temperature: float) -> None:
    """beta of FedHLM [3] compares p(d) with the softmax of the SLM, although the proposal is a point mass."""
    row = logits(seed)
    weights = np.exp((row - row.max()) / temperature)
    expected = float(weights.max() / weights.sum())
    drawn = COUPLINGS["greedy"].draft(row, Sampling(seed=1, temperature=temperature), 0)
    assert drawn.token == int(np.argmax(row))
    assert drawn.prob == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["published-cu", "published-cu-online"])
def test_published_cu_draws_from_the_whole_law(name: str) -> None:
    """The published bias: the draft comes from q, also where x-hat, which it is tested against, is flat."""
    size, count = 64, DRAWS
    row = logits(3, size, spread=0.3)
    sampling = Sampling(seed=11, temperature=1.0)
    q = law(row, sampling)
    drawn = np.bincount([COUPLINGS[name].draft(row, sampling, t).token for t in range(count)], minlength=size)
    top = np.argsort(-q)[:30]
    share, expected = 1.0 - drawn[top].sum() / count, 1.0 - float(q[top].sum())
    assert expected > 0.2
    assert share == pytest.approx(expected, abs=0.05)
    assert chi_square(drawn, q) < size + 4.0 * (2.0 * size) ** 0.5
