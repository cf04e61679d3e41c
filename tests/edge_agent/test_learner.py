"""What a device learns: rounds, a snapshot that loses nothing, certificates that count, noise that is counted."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.events import Observation
from edge_agent.learner import PAIRS_KEPT, Learner
from edge_agent.measures import measures_of
from fedhlm.errors import ProtocolError
from fedhlm.learning.certificate import AUDIT_CHANCES
from fedhlm.learning.curve import Curve
from fedhlm.learning.privacy import sigma_for
from fedhlm.learning.thresholds import KEEP_NONE
from fedhlm.protocol.messages import SCHEMA_VERSION, Learned, PaperThreshold, Sampling
from fedhlm.settings import Generation
from tests.edge_agent.devices import (
    PAIR,
    SAMPLING,
    config,
    finish,
    learner,
    left,
    seen,
    tau_of,
    teach,
)


def test_harmless_tails_are_audited_less_with_evidence_and_doubtful_ones_are_not() -> None:
    settings = config(peers="none")
    device = learner()
    harmless, doubtful = left(1), (left(1)[0]._replace(uncertainty=0.6),)
    measures = teach(device, settings, 300)
    for tail in (harmless, doubtful):
        assert device.audit_chances(measures, settings, tail, tau=0.3) == [settings.audit]
    for _ in range(100):
        finish(device, settings, [], tokens=1_000)
    tail = (*harmless, *doubtful)
    assert device.audit_chances(measures, settings, tail, tau=0.3) == [AUDIT_CHANCES[0], settings.audit]
    text = finish(device, settings, [], tail=tail, tau=0.3, coin=0.0)
    assert text is not None
    assert text.probability == pytest.approx(1.0 - (1.0 - AUDIT_CHANCES[0]) * (1.0 - settings.audit))


def test_audits_become_rarer_for_what_the_threshold_costs_and_not_because_none_has_found_it_yet() -> None:
    """5,000 tokens and no wrong one among them: the curve knows better what keeping up to 0.45 costs (0.45^3 / 3)."""
    settings = config(peers="none")
    device = learner()
    measures = teach(device, settings, 3_000)
    for _ in range(5):
        finish(device, settings, [], tokens=1_000)
    known = device.certificate(measures, settings)
    assert known is not None
    assert known.estimate == 0.0
    by_tau = [device.audit_chances(measures, settings, left(1), tau=tau)[0] for tau in (KEEP_NONE, 0.1, 0.2, 0.45)]
    assert by_tau == sorted(by_tau)
    assert by_tau[:2] == [AUDIT_CHANCES[1], AUDIT_CHANCES[1]]
    assert by_tau[3] == settings.audit
    # Where blocks verify four of five tokens below the threshold, keeping costs a fifth.
    for _ in range(200):
        finish(device, settings, [seen(0.1, 0.0, skipped=True)] * 2 + [seen(0.1, 0.0)] * 8, tokens=10)
    assert device.audit_chances(measures, settings, left(1), tau=0.45)[0] < settings.audit


def test_a_doubt_that_was_wrong_elsewhere_in_the_cluster_is_audited_and_a_lie_lowers_nothing() -> None:
    """Few tokens of its own were right by luck. The cluster knows more, and can only make the device look more often."""
    settings = config(peers="none")
    lucky, unlucky = learner(), learner()
    token = (left(1)[0]._replace(uncertainty=0.3),)
    measures = measures_of(settings, SAMPLING, PAIR)
    lucky.observe(measures, settings, [seen(0.3, 0.0)] * 20)
    unlucky.observe(measures, settings, [seen(0.3, 0.0)] * 10 + [seen(0.3, 1.0)] * 10)
    for device in (lucky, unlucky):
        for _ in range(100):
            finish(device, settings, [], tokens=1_000)
    elsewhere = {share: Curve.empty() for share in (0.0, 0.02)}
    for share, curve in elsewhere.items():
        curve.see(0.3, 1_000.0)
        curve.add(0.3, share, 1_000.0)
    expected = {None: AUDIT_CHANCES[0], 0.0: AUDIT_CHANCES[0], 0.02: settings.audit}
    for told, chance in expected.items():
        for device in (lucky, unlucky):
            device.cluster = {} if told is None else {measures.draft: elsewhere[told]}
        assert lucky.audit_chances(measures, settings, token, tau=0.2) == [chance]
        assert unlucky.audit_chances(measures, settings, token, tau=0.2) == [settings.audit]


def test_the_budget_counts_the_tokens_on_which_a_threshold_decides_and_no_others() -> None:
    """Tokens that are verified whatever their doubt change neither curve nor threshold, and no certificate counts them."""
    settings = config(peers="none")
    plain, ruled = learner(), learner()
    for device in (plain, ruled):
        teach(device, settings, 1_000)
    measures = measures_of(settings, SAMPLING, PAIR)
    always = [seen(0.1, 1.0)._replace(rule="number")] * 500
    ruled.observe(measures, settings, always)
    assert ruled.curves[measures.draft].total_seen == plain.curves[measures.draft].total_seen == 1_000.0
    assert tau_of(ruled, measures, settings) == tau_of(plain, measures, settings)
    finish(ruled, settings, always[:8], tokens=10)
    known = ruled.certificate(measures, settings)
    assert known is not None
    assert known.tokens == 2.0
    # A token that was committed while the link was down is a kept token, whatever the rule says.
    kept = [seen(0.1, 1.0, skipped=True)._replace(rule="number")]
    finish(ruled, settings, kept, tokens=10)
    ruled.observe(measures, settings, kept)
    assert ruled.curves[measures.draft].total_seen == 1_001.0
    later = ruled.certificate(measures, settings)
    assert later is not None
    assert (later.tokens, later.estimate) == (12.0, 1.0 / 12.0)


def test_the_published_threshold_moves_up_and_follows_the_cluster() -> None:
    settings = config("fedhlm")
    device = learner()
    measures = teach(device, settings, 200)
    before = tau_of(device, measures, settings)
    ended = device.contribution(settings, 1.0)
    assert ended is not None
    paper = ended[0][PAIR]
    assert paper.count == 200
    assert before < paper.threshold == tau_of(device, measures, settings)
    assert device.contribution(settings, 2.0)[0][PAIR].count == 0  # type: ignore[index]
    state = Learned(
        version=SCHEMA_VERSION, sender="edge", sequence=1, sent_ms=0, round=1, members=2,
        thresholds={PAIR: PaperThreshold(0.9, 5)},
    )  # fmt: skip
    device.learned(state)
    assert tau_of(device, measures, settings) == 0.9


def test_rounds_are_due_by_count_or_time() -> None:
    settings = config(learning__round_tokens=20, learning__round_s=5)
    device = learner()
    device.contribution(settings, 100.0)
    assert not device.due(settings, 200.0)  # nothing new
    finish(device, settings, [])
    assert not device.due(settings, 104.0)
    assert device.due(settings, 105.0)
    finish(device, settings, [])
    assert device.due(settings, 100.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=20))
def test_the_certificate_counts_every_skipped_token_once(texts: list[tuple[int, int, bool]]) -> None:
    settings = config()
    device = learner()
    expected = 0.0
    for scored, tail, audited in texts:
        observations = [seen(0.1, 1.0, skipped=True)] * scored
        open_text = finish(device, settings, observations, tail=left(tail), coin=0.0 if audited else 1.0)
        assert (open_text is not None) == (audited and tail > 0)
        if open_text is not None:
            device.audited(open_text, [1.0] * tail)
        expected += scored + (audited and tail / (1.0 - 0.75**tail) if tail else 0.0)
    known = device.certificate(measures_of(settings, SAMPLING, PAIR), settings)
    assert known is not None
    assert (known.texts, known.tokens) == (len(texts), 10 * len(texts))
    assert known.estimate == pytest.approx(expected / (10 * len(texts)) if texts else 0.0)
    assert known.limit(0.95) >= min(1.0, known.estimate)


@pytest.mark.parametrize("tail", [1, 2, 5, 200])
def test_the_audits_coin_comes_up_with_the_tails_probability(tail: int) -> None:
    """Each token of a tail has a chance of `generation.audit`: over even coins the share is what the formula says."""
    settings = config()
    count = 4_000
    coins = (np.arange(count) + 0.5) / count
    due = sum(finish(learner(), settings, [], tail=left(tail), tokens=300, coin=float(c)) is not None for c in coins)
    assert due / count == pytest.approx(1.0 - 0.75**tail, abs=2.0 / count)


def test_texts_enter_the_certificate_in_their_order() -> None:
    """What came after a text that waits for its audit counts only after it."""
    settings = config()
    device = learner()
    measures = measures_of(settings, SAMPLING, PAIR)
    first = finish(device, settings, [], tail=left(2), coin=0.0)
    finish(device, settings, [seen(0.1, 1.0, skipped=True)])
    third = finish(device, settings, [], tail=left(1), coin=0.0)
    assert first is not None
    assert third is not None
    device.audited(third, [0.0])

    def texts() -> float:
        known = device.certificate(measures, settings)
        assert known is not None
        return known.texts

    assert texts() == 0.0
    device.audited(first, [0.0, 0.0])
    assert texts() == 3.0


def test_what_nobody_scored_counts_as_wrong_where_it_should_have_been() -> None:
    settings = config()
    device = learner()
    measures = measures_of(settings, SAMPLING, PAIR)
    text = finish(device, settings, [], tail=left(4), coin=0.0)
    assert text is not None
    kept = learner()
    kept.restore(device.snapshot())  # a restart loses the audit
    device.audited(text, None)
    for found in (device, kept):
        known = found.certificate(measures, settings)
        assert known is not None
        assert known.estimate == pytest.approx(0.4 / (1.0 - 0.75**4))


def test_tokens_without_a_link_are_always_audited() -> None:
    device, settings = learner(), config()
    text = finish(device, settings, [], tail=left(1, "unverified"), coin=0.999)
    assert text is not None
    assert text.probability == 1.0


def test_a_snapshot_keeps_everything() -> None:
    settings, paper = config(), config("fedhlm")
    device = learner()
    measures = teach(device, settings, 500)
    finish(device, settings, [seen(0.1, 1.0, skipped=True)])
    device.contribution(paper, 1.0)
    again = learner()
    again.restore(device.snapshot())
    assert again.snapshot() == device.snapshot()
    assert tau_of(again, measures, settings) == tau_of(device, measures, settings)
    assert again._certificates[measures.draft].state() == device._certificates[measures.draft].state()
    assert again.round == 1


@given(st.binary(max_size=200))
def test_a_garbled_snapshot_is_refused_and_changes_nothing(data: bytes) -> None:
    device = learner()
    teach(device, config(), 20)
    before = device.snapshot()
    for garbled in (data, before[:-1], before + data + b"\0"):
        with pytest.raises(ProtocolError):
            device.restore(garbled)
    assert device.snapshot() == before


def test_privacy_adds_noise_and_runs_out() -> None:
    settings = config()
    device = learner(epsilon=1.0, releases=2)
    measures = teach(device, settings, 100)
    first = device.contribution(settings, 1.0)
    assert first is not None
    assert Curve.from_bytes(first[1][measures.draft]).rows() != pytest.approx(device.curves[measures.draft].rows())
    assert device.contribution(settings, 2.0) is not None
    assert device.contribution(settings, 3.0) is None


def test_different_ways_of_generating_never_mix() -> None:
    settings = config()
    greedy = Sampling(1, 0.0, 1.0, "gumbel")
    names = {
        measures_of(settings, SAMPLING, PAIR).draft,
        measures_of(settings, greedy, PAIR).draft,
        measures_of(config("fedhlm"), greedy, PAIR).draft,
        measures_of(config(uncertainty="entropy"), greedy, PAIR).draft,
    }
    assert len(names) == 4


@pytest.mark.parametrize("control", [float("nan"), float("inf"), -1e308])
def test_a_state_with_an_impossible_control_is_refused_and_changes_nothing(control: float) -> None:
    device = learner()
    state = Learned(
        version=SCHEMA_VERSION, sender="edge", sequence=1, sent_ms=0, round=1, members=1,
        thresholds={PAIR: PaperThreshold(0.9, 1, control)}, curves={"u": Curve.empty().to_bytes()},
    )  # fmt: skip
    with pytest.raises(ProtocolError, match="threshold.control"):
        device.learned(state)
    assert (device.threshold, device.cluster, device._paper[PAIR].server_control) == (None, {}, 0.0)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (1, 2**31),
        (1, -1),
        (2, -1),
        (3, []),
        (3, ["p"] * (PAIRS_KEPT + 1)),
        (4, {"p": [1.5, None, 0.0, 0.0]}),
        (4, {"p": [float("nan"), None, 0.0, 0.0]}),
        (4, {"p": [0.5, None, float("nan"), 0.0]}),
        (4, {"p": [0.5, None, 0.0, 1e308]}),
    ],
)
def test_a_snapshot_with_a_number_out_of_range_is_refused(place: int, value: Any) -> None:
    kept = msgspec.msgpack.decode(learner().snapshot())
    kept[place] = value
    with pytest.raises(ProtocolError):
        learner().restore(msgspec.msgpack.encode(kept))


def state_of(threshold: float, control: float = 0.0) -> Learned:
    return Learned(
        version=SCHEMA_VERSION, sender="edge", sequence=1, sent_ms=0, round=1, members=2,
        thresholds={PAIR: PaperThreshold(threshold, 5, control)},
    )  # fmt: skip


def paper_round(device: Learner, settings: Generation, observations: list[Observation]) -> PaperThreshold:
    device.observe(measures_of(settings, SAMPLING, PAIR), settings, observations)
    ended = device.contribution(settings, 1.0)
    assert ended is not None
    return ended[0][PAIR]


def test_fedprox_is_anchored_at_the_clusters_threshold_over_several_rounds() -> None:
    """A device that has moved on since the last state is drawn back to that state, not to where it stands."""
    settings = config("fedhlm", learning__optimiser="fedprox", learning__gamma=1e-9, learning__proximal=5,
                      learning__learning_rate=0.1, learning__decay=0)  # fmt: skip
    device = learner()
    device.learned(state_of(0.2))
    device._paper[PAIR].threshold = 0.6
    assert paper_round(device, settings, [seen(0.9, 0.5)]).threshold == pytest.approx(0.6 + 0.1 * 5.0 * (0.2 - 0.6))


def test_scaffold_uses_the_control_that_the_cluster_sent() -> None:
    settings = config("fedhlm", learning__optimiser="scaffold", learning__gamma=1e-9, learning__learning_rate=0.1,
                      learning__decay=0)  # fmt: skip
    device = learner()
    device.learned(state_of(0.5, control=0.3))
    assert paper_round(device, settings, [seen(0.9, 0.5)]).threshold == pytest.approx(0.5 - 0.1 * 0.3)


def test_the_published_rate_diminishes_round_by_round() -> None:
    """eta_t = eta / (1 + decay t) with t the device's round: equal observations move the threshold less and less."""
    settings = config("fedhlm", learning__decay=1.0, learning__learning_rate=0.001)
    moves = []
    device = learner()
    for _ in range(4):
        device._paper[PAIR].threshold = 0.5
        moves.append(paper_round(device, settings, [seen(0.5, 0.0)] * 5).threshold - 0.5)
    assert moves[0] > 0.0
    assert [move / moves[0] for move in moves] == pytest.approx([1.0, 1 / 2, 1 / 3, 1 / 4])


def test_the_published_loss_is_over_transmitted_tokens() -> None:
    settings = config("fedhlm")
    sent, kept = [seen(0.9, 1.0)] * 3, [seen(0.1, 0.0, skipped=True)] * 50
    alone, mixed = learner(), learner()
    expected = paper_round(alone, settings, sent)
    found = paper_round(mixed, settings, [*kept, *sent])
    assert (found.count, found.threshold) == (3, expected.threshold)


def test_privacys_noise_covers_a_token_that_is_in_both_curves() -> None:
    """A token changes the drafts' curve and the peers' curve, so each gets the noise of a sensitivity sqrt(2) as large."""
    settings, releases = config(), 3
    device = learner(epsilon=50.0, releases=releases)
    device._rng = np.random.default_rng(5)
    measures = measures_of(settings, SAMPLING, PAIR)
    many = 10_000.0
    for name in (measures.draft, measures.peers):
        device.curves[name] = Curve(*np.full((4, 64), many))
    errors = []
    for _ in range(releases):
        ended = device.contribution(settings, 1.0)
        assert ended is not None
        errors += [Curve.from_bytes(data).seen - many for data in ended[1].values()]
    deviation = float(np.concatenate(errors).std())
    assert deviation == pytest.approx(2.0**0.5 * sigma_for(50.0, device._federation.delta, releases), rel=0.15)
