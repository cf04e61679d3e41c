"""The fleet's certificate: members add up, none counts for more than was witnessed, and what was done stays."""

import math
import random
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.errors import ProtocolError
from fedhlm.learning.certificate import AUDIT_CHANCES, SLOPES, Certificate, audit_probability
from fedhlm.learning.evidence import FleetEvidence, SavedEvidence, Witness, Witnessed, certificates_of, fleet_of
from fedhlm.learning.settled import SettledTokens
from fedhlm.protocol.fields import MAX_PAIRS, Pair
from fedhlm.protocol.messages import SCHEMA_VERSION, Evidence, Verdict

PAIR, OTHER = "3fa4b1.09c2de", "3fa4b1.f00baa"


def certificate(tokens: int, wrong: int = 0) -> Certificate:
    known = Certificate()
    known.add(tokens, [1.0] * wrong)
    return known


def said(known: Certificate, began_ms: int = 1, pair: Pair = PAIR) -> Evidence:
    return Evidence(began_ms, {pair: known.to_bytes()})


def saw(*of: tuple[str, Witness]) -> Witnessed:
    found = dict(of)
    return lambda pair: found.get(pair, Witness())


def total(fleet: FleetEvidence, pair: Pair = PAIR) -> Certificate:
    return fleet.totals().get(pair, Certificate())


def numbers(known: Certificate) -> list[float]:
    """Tokens, harm and log-sums; the tests' certificates put many texts into one."""
    figures = known.figures()
    del figures["texts"]
    return list(figures.values())


def claims() -> st.SearchStrategy[Certificate]:
    """Whatever a member may send: any number of tokens, any harm, any log-sums."""
    sums = st.tuples(*[st.floats(-1e6, 0.0)] * SLOPES.size)
    tokens = st.floats(0.0, 1e6)
    return st.builds(
        lambda n, share, harm, upper: Certificate.from_bytes(np.array([n, n * share, harm, *upper], "<f8").tobytes()),
        tokens, st.floats(0.0, 1.0), tokens, sums,
    )  # fmt: skip


def witnesses() -> st.SearchStrategy[Witness]:
    def made(settled: int, wrong: float, tails: list[tuple[int, float]]) -> Witness:
        audited = sum(a for a, _ in tails)
        missed = sum(math.floor(a * share) for a, share in tails)
        return Witness(
            settled,
            math.floor(settled * wrong),
            audited,
            missed,
            sum(a / audit_probability(AUDIT_CHANCES[0], a) for a, _ in tails),
        )

    share = st.floats(0.0, 1.0)
    return st.builds(made, st.integers(0, 5_000), share, st.lists(st.tuples(st.integers(1, 40), share), max_size=20))


# Sums


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 5)), min_size=1, max_size=8), st.randoms())
def test_the_fleet_is_the_sum_of_its_members_in_any_order_and_with_repeats(
    members: list[tuple[int, int]], rng: random.Random
) -> None:
    fleet, known = FleetEvidence(), [certificate(n, min(n, wrong)) for n, wrong in members]
    fleet.begin(5)
    heard = [i for i in range(len(known)) for _ in range(2)]
    rng.shuffle(heard)
    for i in heard:
        fleet.hear(f"a{i}", said(known[i]))
    expected = sum(known, Certificate())
    assert numbers(total(fleet)) == pytest.approx(numbers(expected))
    assert total(fleet).limit(0.95) == pytest.approx(expected.limit(0.95))


def test_pairs_of_models_have_certificates_of_their_own() -> None:
    fleet = FleetEvidence()
    fleet.begin(7)
    fleet.hear("a", said(certificate(100, 3)))
    fleet.hear("b", said(certificate(50), pair=OTHER))
    fleet.hear("a", said(certificate(10), pair=OTHER))
    assert total(fleet).tokens == 100, "the state of the former pair is not sent any more, and stays"
    assert total(fleet, OTHER).tokens == 60
    told = fleet.message()
    assert told is not None
    assert told.began_ms == 7
    assert set(certificates_of(told)) == {PAIR, OTHER}
    found = fleet_of(told, "09c2de")
    assert found is not None
    assert found.tokens == 100
    assert fleet_of(told, "aaaaaa") is None
    assert fleet_of(None, "09c2de") is None


def test_more_pairs_than_a_message_holds_keep_their_tokens() -> None:
    fleet = FleetEvidence()
    fleet.begin(1)
    for i in range(MAX_PAIRS + 5):
        fleet.hear("a", said(certificate(10 + i), pair=f"p{i}.l"))
    told = fleet.message()
    assert told is not None
    assert sorted(told.sums) == sorted(f"p{i}.l" for i in range(5, MAX_PAIRS + 5))


# Devices come and go


def test_a_device_that_loses_its_disk_starts_a_new_evidence_and_the_fleets_stays() -> None:
    fleet = FleetEvidence()
    fleet.hear("a", said(certificate(1_000, 20)))
    fleet.hear("a", said(certificate(50, 2), began_ms=2))
    fleet.hear("a", said(certificate(80, 3), began_ms=2))
    assert numbers(total(fleet)) == pytest.approx(numbers(certificate(1_000, 20) + certificate(80, 3)))


def test_what_a_device_without_its_disk_did_elsewhere_does_not_count_here() -> None:
    """Tokens that were seen here before stand for the former evidence, and not for the new one."""
    fleet = FleetEvidence()
    fleet.hear("a", said(certificate(1_000)), saw((PAIR, Witness(settled=1_000.0))))
    elsewhere = certificate(1_000, wrong=300)
    fleet.hear("a", said(elsewhere, began_ms=2), saw((PAIR, Witness(settled=1_000.0))))
    fleet.hear("a", said(elsewhere + certificate(500), began_ms=2), saw((PAIR, Witness(settled=1_500.0))))
    assert total(fleet).tokens == 1_500.0
    assert total(fleet).figures()["harm"] == 0.0


def test_a_device_that_leaves_takes_nothing_along_and_counts_elsewhere_by_what_it_does_there() -> None:
    here, there = FleetEvidence(), FleetEvidence()
    seen = Witness(1_000.0, 20.0)
    here.hear("a", said(certificate(1_000, 20)), saw((PAIR, seen)))
    assert numbers(total(here)) == pytest.approx(numbers(certificate(1_000, 20)))
    there.hear("a", said(certificate(1_000, 20)), saw((PAIR, Witness())))
    assert total(there).tokens == 0.0
    later = certificate(1_000, 20) + certificate(100, 4)
    there.hear("a", said(later), saw((PAIR, Witness(100.0, 4.0))))
    assert numbers(total(there)) == pytest.approx(numbers(certificate(100, 4)))
    here.hear("a", said(later), saw((PAIR, Witness())))  # the edge closed its account when the agent moved
    assert numbers(total(here)) == pytest.approx(numbers(certificate(1_000, 20))), "back: counted once"
    here.hear("a", said(later + certificate(50, 1)), saw((PAIR, Witness(50.0, 1.0))))
    assert numbers(total(here)) == pytest.approx(numbers(certificate(1_050, 21)))


def test_a_device_that_went_back_to_an_older_state_is_counted_once() -> None:
    """A power cut: what it did between its last save and the cut was witnessed, and stays."""
    fleet = FleetEvidence()
    fleet.hear("a", said(certificate(1_000, 20)), saw((PAIR, Witness(1_000.0, 20.0))))
    fleet.hear("a", said(certificate(900, 18)), saw((PAIR, Witness(1_000.0, 20.0))))
    assert numbers(total(fleet)) == pytest.approx(numbers(certificate(1_000, 20)))
    fleet.hear("a", said(certificate(950, 19)), saw((PAIR, Witness(1_050.0, 21.0))))
    assert numbers(total(fleet)) == pytest.approx(numbers(certificate(1_050, 21)))


def test_a_restarted_edge_goes_on_where_it_was() -> None:
    fleet = FleetEvidence()
    fleet.begin(3)
    fleet.hear("a", said(certificate(1_000, 20)), saw((PAIR, Witness(1_000.0, 20.0))))
    fleet.hear("b", said(certificate(100)), saw((PAIR, Witness(100.0))))
    again = FleetEvidence()
    again.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(fleet.snapshot()), type=SavedEvidence))
    assert numbers(total(again)) == pytest.approx(numbers(total(fleet)))
    again.hear("a", said(certificate(1_000, 20) + certificate(60, 1)), saw((PAIR, Witness(60.0, 1.0))))
    assert numbers(total(again)) == pytest.approx(numbers(certificate(1_160, 21)), abs=1e-9)
    again.hear("a", said(certificate(5_000, 21)), saw((PAIR, Witness(60.0, 1.0))))
    assert total(again).tokens == pytest.approx(1_160), "the witness of this life saw no more"


def test_a_cloud_without_a_disk_inherits_its_state_and_counts_nothing_twice() -> None:
    before = FleetEvidence()
    before.begin(9)
    before.hear("c1", said(certificate(1_000, 20)))
    before.hear("c2", said(certificate(500, 5)))
    after = FleetEvidence()
    after.inherit(before.message())
    after.begin(99)
    assert after.began_ms == 9
    after.hear("c1", said(certificate(1_000, 20)))
    assert numbers(total(after)) == pytest.approx(numbers(certificate(1_500, 25)))
    after.hear("c1", said(certificate(1_200, 22)))
    assert numbers(total(after)) == pytest.approx(numbers(certificate(1_700, 27)))
    shrunk = certificate(700, 10)  # an edge that has forgotten a member
    after.hear("c1", said(shrunk))
    assert numbers(total(after)) == pytest.approx(numbers(certificate(1_200, 15)))
    again = FleetEvidence()
    again.restore(after.snapshot())
    assert numbers(total(again)) == pytest.approx(numbers(certificate(1_200, 15)))


# Liars


@given(claims(), witnesses(), st.integers(1, 5_000), st.floats(0.0, 0.2))
def test_no_claim_lowers_the_limit_by_more_than_what_was_seen_of_its_member(
    claim: Certificate, seen: Witness, honest: int, rate: float
) -> None:
    """A liar's share of wrong tokens is at least that of what the edge saw of it, and its tokens at most those seen."""
    rest = certificate(honest, math.floor(honest * rate))
    fleet = FleetEvidence()
    fleet.hear("honest", said(rest))
    fleet.hear("liar", said(claim), saw((PAIR, seen)))
    counted = total(fleet) - rest
    figures = counted.figures()
    assert -1e-6 <= counted.tokens <= seen.tokens + 1e-6
    if counted.tokens > 1e-6:
        blocks = seen.wrong + seen.audited_wrong, seen.settled + seen.audited
        stands_for = seen.tails / seen.audited if seen.audited else 1.0
        most = seen.wrong + stands_for * seen.audited_wrong, seen.settled + seen.tails
        least = min(wrong / tokens for wrong, tokens in (blocks, most) if tokens)
        assert figures["harm"] / counted.tokens >= min(1.0, least) - 1e-6
        for k, slope in enumerate(SLOPES):
            assert figures[f"upper_{k}"] <= min(1.0, least) * counted.tokens * math.log1p(-slope) + 1e-6


@given(claims(), witnesses(), st.integers(1, 5_000), st.floats(0.0, 0.2))
def test_what_counts_is_never_better_than_the_claim(
    claim: Certificate, seen: Witness, honest: int, rate: float
) -> None:
    rest = certificate(honest, math.floor(honest * rate))
    limited = seen.limited(claim)
    assert limited.limit(0.95) >= claim.limit(0.95) - 1e-9
    worse = limited.tokens < claim.tokens or limited.figures()["harm"] > claim.figures()["harm"]
    assert (rest + limited).limit(0.95) >= rest.limit(0.95) - 1e-9 or limited.tokens > 0.0 or not worse


@given(claims(), st.integers(100, 5_000), st.integers(0, 200))
def test_a_vandal_can_at_most_make_its_own_seen_tokens_all_wrong(claim: Certificate, tokens: int, honest: int) -> None:
    seen = Witness(float(tokens))
    rest = certificate(5_000, honest)
    fleet = FleetEvidence()
    fleet.hear("honest", said(rest))
    fleet.hear("vandal", said(claim), saw((PAIR, seen)))
    assert total(fleet).limit(0.95) <= (rest + certificate(tokens, tokens)).limit(0.95) + 1e-9


def verdict(accepted: int, missed: int = 0) -> Verdict:
    bits = ((1 << missed) - 1).to_bytes(-(-accepted // 8), "little")
    return Verdict(
        SCHEMA_VERSION, "cloud", 1, 0, session=1, epoch=0, base=3, status="settled", accepted=accepted,
        target_probs=bytes(2 * accepted), missed=bits,
    )  # fmt: skip


class Device:
    """Writes texts of 24 tokens: 20 go up in blocks, the last 4 are a tail. Its own certificate is right."""

    def __init__(self, edge: SettledTokens, name: str, rate: float, seed: int) -> None:
        self.edge, self.name, self.rate = edge, name, rate
        self.known = Certificate()
        self.wrong = self.tokens = 0
        self._rng = np.random.default_rng(seed)

    def write(self, texts: int) -> None:
        p = audit_probability(0.25, 4)
        for _ in range(texts):
            block, tail = (int(self._rng.binomial(n, self.rate)) for n in (20, 4))
            self.edge.note(self.name, verdict(20, block), PAIR)
            audited = self._rng.random() < p
            if audited:
                self.edge.note(self.name, verdict(4, tail), PAIR, audit=True)
            harms = [1.0] * tail + [0.0] * (4 - tail)
            self.known.add(24, [1.0] * block, 4, harms if audited else None, probability=p)
            self.wrong += block + tail
            self.tokens += 24

    def tell(self, fleet: FleetEvidence, claim: Certificate | None = None, began_ms: int = 1) -> None:
        fleet.hear(self.name, said(claim or self.known, began_ms), lambda pair: self.edge.witness(self.name, pair))


def fleet_of_eight(texts: int, seed: int, rate: float = 0.02) -> tuple[FleetEvidence, list[Device]]:
    edge, fleet = SettledTokens(frozenset({"closed-form"})), FleetEvidence()
    devices = [Device(edge, f"a{i}", rate, seed * 100 + i) for i in range(8)]
    for _ in range(3):
        for device in devices:
            device.write(texts // 3)
            device.tell(fleet)
    return fleet, devices


def sum_of(devices: Sequence[Device]) -> Certificate:
    return sum((device.known for device in devices), Certificate())


def test_the_honest_lose_next_to_nothing_to_the_witness() -> None:
    ratios, kept = [], []
    for seed in range(20):
        fleet, devices = fleet_of_eight(60, seed)
        whole = sum_of(devices)
        kept.append(total(fleet).tokens / whole.tokens)
        ratios.append(total(fleet).limit(0.95) / whole.limit(0.95))
    assert min(kept) > 0.99
    assert 1.0 - 1e-9 <= np.mean(ratios) < 1.02
    assert max(ratios) < 1.06


LIES = {
    "clean": lambda device: Certificate.from_bytes(np.array([1e9, 1.0, 0.0, *[0.0] * SLOPES.size], "<f8").tobytes()),
    "half": lambda device: certificate(round(device.tokens), device.wrong // 2),
    "silent about harm": lambda device: certificate(round(device.tokens)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_of_eight_with_the_same_texts_moves_the_limit_by_a_few_percent(lie: str) -> None:
    moves = []
    for seed in range(10):
        fleet, devices = fleet_of_eight(60, seed)
        honest = total(fleet).limit(0.95)
        devices[0].tell(fleet, LIES[lie](devices[0]))
        moves.append(total(fleet).limit(0.95) / honest)
        assert total(fleet).limit(0.95) > sum(d.wrong for d in devices) / sum(d.tokens for d in devices)
    assert 0.97 < np.mean(moves) <= 1.02


def test_cuts_of_liars_are_counted_and_the_luck_of_the_honest_is_not() -> None:
    tells = cuts = 0
    for seed in range(20):
        fleet, devices = fleet_of_eight(60, seed)
        tells, cuts = tells + 3 * len(devices), cuts + fleet.cut
        before = fleet.cut
        liar = max(devices, key=lambda device: device.wrong)
        lie = ("clean", "silent about harm")[seed % 2]
        liar.tell(fleet, LIES[lie](liar))
        assert fleet.cut == before + 1, lie
    assert cuts <= 0.01 * tells


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_the_luck_of_texts_of_one_token_is_no_cut_and_their_liars_are(rate: float) -> None:
    """The tail of such a text is one token, so the few that are audited stand for 38 each."""
    p = audit_probability(AUDIT_CHANCES[0], 1)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        seen, known, fleet = Witness(), Certificate(), FleetEvidence()
        for text in range(1, 301):
            harm = float(rng.random() < rate)
            audited = rng.random() < p
            known.add(1, [], 1, [harm] if audited else None, probability=p)
            if audited:
                seen = Witness(0.0, 0.0, seen.audited + 1.0, seen.audited_wrong + harm, seen.tails + 1.0 / p)
            if text % 20 == 0:
                fleet.hear("a", said(known), saw((PAIR, seen)))
        assert fleet.cut == 0, seed
        fleet.hear("a", said(certificate(100_000)), saw((PAIR, seen)))
        assert fleet.cut == 1, seed


def test_a_liar_gains_nothing_by_beginning_again_and_again() -> None:
    fleet, devices = fleet_of_eight(60, 1)
    before = total(fleet)
    for began_ms in range(2, 50):
        devices[0].tell(fleet, certificate(1_000), began_ms)
    after = total(fleet)
    seen = devices[0].edge.witness("a0", PAIR)
    assert after.tokens <= before.tokens + max(0.0, seen.tokens - devices[0].known.tokens) + 1e-6
    assert after.figures()["harm"] >= before.figures()["harm"] - 1e-6


# Forgetting


def test_a_forgotten_members_sums_go_and_the_choice_is_paid_for() -> None:
    fleet, devices = fleet_of_eight(60, 2)
    rest = sum_of(devices[1:])
    alone = FleetEvidence()
    for device in devices[1:]:
        device.tell(alone)
    assert fleet.forget("a0")
    assert not fleet.forget("a0")
    assert not fleet.forget("nobody")
    assert total(fleet).tokens == pytest.approx(total(alone).tokens)
    assert total(fleet).limit(0.95) > total(alone).limit(0.95) >= rest.limit(0.95) - 1e-9
    assert total(fleet).limit(0.95) == pytest.approx(total(alone).limit(1.0 - 0.05 / (8 * 9)), rel=1e-6)


def test_forgetting_whoever_looks_worst_does_not_break_the_promise() -> None:
    """Few tokens and much harm, where picking pays most: the truth may be above the limit in 1 of 20 fleets."""
    above = free = 0
    lives = 2_000
    rng = np.random.default_rng(3)
    for _ in range(lives):
        fleet = FleetEvidence()
        wrong = rng.binomial(60, 0.3, size=4)
        for i, count in enumerate(wrong):
            fleet.hear(f"a{i}", said(certificate(60, int(count))))
        free += total(fleet).limit(0.95) < 0.3
        for worst in np.argsort(-wrong)[:2]:
            fleet.forget(f"a{worst}")
        above += total(fleet).limit(0.95) < 0.3
    assert above <= 0.05 * lives
    assert free <= 0.05 * lives


# What cannot be


@pytest.mark.parametrize(
    "sums",
    [
        b"",
        np.array([-1.0, 0.0, 0.0, *[0.0] * 6], "<f8").tobytes(),
        np.array([1.0, 2.0, 0.0, *[0.0] * 6], "<f8").tobytes(),
        np.array([1.0, 1.0, 0.0, *[0.1] * 6], "<f8").tobytes(),
        np.array([1.0, 1.0, 0.0, *[float("nan")] * 6], "<f8").tobytes(),
        np.array([float("inf"), 1.0, 0.0, *[0.0] * 6], "<f8").tobytes(),
        np.array([1.0, 1.0, float("nan"), *[0.0] * 6], "<f8").tobytes(),
    ],
)
def test_impossible_sums_are_refused_and_change_nothing(sums: bytes) -> None:
    fleet = FleetEvidence()
    fleet.begin(1)
    fleet.hear("a", said(certificate(10)))
    before = fleet.snapshot()
    with pytest.raises(ProtocolError):
        fleet.hear("a", Evidence(1, {PAIR: certificate(20).to_bytes(), OTHER: sums}))
    with pytest.raises(ProtocolError):
        fleet.hear("b", Evidence(1, {PAIR: sums}))
    assert fleet.snapshot() == before
