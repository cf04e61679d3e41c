"""What an edge saw settled bounds what its agents may claim; who says what it was told is never cut."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.learning.curve import Curve
from fedhlm.learning.settled import AGENTS_MAX, SLACK_SHARE, SLACK_TOKENS, SettledTokens
from fedhlm.protocol.messages import SCHEMA_VERSION, PaperThreshold, Verdict
from fedhlm.protocol.packing import pack_bits, pack_probs
from fedhlm_lab.sim.liars import LIES

PAIR = "one"  # of an unknown LLM, whose verdicts `note` counts by default
DRAFTS, PEERS = "closed-form/gumbel/greedy", "neighbour/gumbel/greedy"


def verdict(
    accepted: int, drafts: int, missed: list[bool] | None = None, status: Literal["settled", "unprimed"] = "settled"
) -> Verdict:
    """The cloud's answer to `drafts` ids; what it did not accept it looked at, and nothing behind it."""
    looked_at = min(drafts, accepted + 1)
    return Verdict(
        version=SCHEMA_VERSION, sender="cloud", sequence=1, sent_ms=1, session=1, epoch=0, base=1,
        status=status, accepted=accepted, target_probs=pack_probs(np.full(looked_at, 0.5)), missed=pack_bits(missed or []),
    )  # fmt: skip


class Agent:
    """What an honest agent learns from verdicts that pass an edge."""

    def __init__(self, edge: SettledTokens, rate: float, seed: int = 0) -> None:
        self.edge = edge
        self.curve = Curve.empty()
        self._rate = rate
        self._rng = np.random.default_rng(seed)

    def live(self, tokens: int, heard: float = 1.0) -> None:
        """One verdict for each token; of these the share `heard` comes in time."""
        for _ in range(tokens):
            wrong = bool(self._rng.random() < self._rate)
            self.edge.note("a", verdict(0 if wrong else 1, 1))
            if self._rng.random() < heard:
                u = float(self._rng.random())
                self.curve.see(u)
                self.curve.add(u, float(wrong))

    def say(self, curve: Curve | None = None) -> tuple[Curve, tuple[str, ...]]:
        claim = self.edge.check("a", {}, {DRAFTS: self.curve if curve is None else curve})
        return claim.curves[DRAFTS], claim.cut


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 0.5), st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_the_honest_are_never_cut(seed: int, rate: float, lives: list[int]) -> None:
    agent = Agent(SettledTokens(UNCERTAINTIES), rate, seed)
    for tokens in lives:
        agent.live(tokens, heard=0.8)
        said, cut = agent.say()
        assert cut == ()
        np.testing.assert_array_equal(said.rows(), agent.curve.rows())


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_is_held_to_what_it_was_told(lie: str) -> None:
    agent = Agent(SettledTokens(UNCERTAINTIES), 0.2)
    agent.say()
    for _ in range(10):
        agent.live(200)
        said, cut = agent.say(LIES[lie](agent.curve, 40))
    honest = agent.edge.sums({DRAFTS: agent.curve})
    assert said.flaw() is None
    assert said.total_weight <= 2_000 + SLACK_TOKENS + 1e-6
    assert said.harm.sum() >= 0.25 * honest.harm
    assert bool(cut) == (lie != "seen")  # decisions are not settled by anybody; they serve nobody but their device


def test_history_from_before_this_edge_counts_once() -> None:
    """An agent with a state folder brings 10,000 tokens along; from then on it may add what passes."""
    agent = Agent(SettledTokens(UNCERTAINTIES), 0.1)
    veteran = Curve.empty()
    veteran.add(0.5, 0.1, 10_000.0)
    assert agent.say(veteran)[1] == ()
    more = veteran.scaled(2.0)
    said, cut = agent.say(more)
    assert said.total_weight == pytest.approx(10_000.0 * (1.0 + SLACK_SHARE) + SLACK_TOKENS)
    assert "claims 20000 tokens, 12756 at most were scored" in cut
    assert agent.edge.check("b", {}, {DRAFTS: more}, {DRAFTS: veteran}).cut


def test_fixed_ids_count_by_their_bits_and_what_decides_nothing_does_not() -> None:
    edge = SettledTokens(UNCERTAINTIES)
    edge.note("a", verdict(3, 4, [True, False, True]))
    edge.note("a", verdict(4, 4, status="unprimed"))
    account = edge._account("a", "").passed
    assert account == (4.0, 3.0)


def test_the_peers_curve_is_bounded_by_itself() -> None:
    edge = SettledTokens(UNCERTAINTIES)
    for _ in range(1_000):
        edge.note("a", verdict(1, 1))
    both = Curve.empty()
    both.add(0.5, 0.0, 1_000.0)
    assert edge.check("a", {}, {DRAFTS: both, PEERS: both}).cut == ()
    boast = both.scaled(10.0)
    claim = edge.check("a", {}, {DRAFTS: both, PEERS: boast})
    assert claim.curves[PEERS].total_weight == pytest.approx(1_000 + SLACK_TOKENS)
    assert claim.curves[DRAFTS].total_weight == pytest.approx(1_000)


def test_a_threshold_counts_the_tokens_of_its_round() -> None:
    edge = SettledTokens(UNCERTAINTIES)
    for _ in range(100):
        edge.note("a", verdict(1, 1))
    claim = edge.check("a", {PAIR: PaperThreshold(1.0, 2**31 - 1)}, {})
    assert claim.thresholds == {PAIR: PaperThreshold(1.0, 100 + int(SLACK_TOKENS))}
    assert claim.cut
    edge.note("a", verdict(1, 1))
    claim = edge.check("a", {PAIR: PaperThreshold(0.5, 1)}, {})
    assert (claim.thresholds, claim.cut) == ({PAIR: PaperThreshold(0.5, 1)}, ())


def test_accounts_are_bounded() -> None:
    edge = SettledTokens(UNCERTAINTIES)
    for i in range(AGENTS_MAX + 10):
        edge.note(f"a{i}", verdict(1, 1))
    assert len(edge._accounts) == AGENTS_MAX


def test_the_harm_of_one_large_model_is_not_asked_of_another() -> None:
    """The old one disagreed with every second token, the new one with none."""
    edge = SettledTokens(UNCERTAINTIES)
    for i in range(1_000):
        edge.note("a", verdict(i % 2, 1), "3fa4b1.09c2de")
        edge.note("a", verdict(1, 1), "3fa4b1.f00baa")
    clean = Curve.empty()
    clean.add(0.5, 0.0, 1_000.0)
    old, new = f"{DRAFTS}/3fa4b1.09c2de", f"{DRAFTS}/3fa4b1.f00baa"
    assert edge.check("a", {}, {new: clean}).cut == ()
    assert "lacks the harm" in " ".join(edge.check("a", {}, {old: clean}).cut)
    assert edge.check("a", {}, {new: clean.scaled(2.0)}).curves[new].total_weight < 1_300.0


def test_another_small_model_is_not_held_to_the_harm_of_the_former_one() -> None:
    edge = SettledTokens(UNCERTAINTIES)
    for _ in range(1_000):
        edge.note("a", verdict(0, 1), "bad000.09c2de")
        edge.note("a", verdict(1, 1), "900d00.09c2de")
    clean = Curve.empty()
    clean.add(0.5, 0.0, 1_000.0)
    assert edge.check("a", {}, {f"{DRAFTS}/900d00.09c2de": clean}).cut == ()
    assert edge.witness("a", "900d00.09c2de").wrong == 0.0
    assert edge.witness("a", "bad000.09c2de").settled == 0.0


def test_a_pair_that_an_agent_names_later_brings_nothing_along() -> None:
    """Otherwise each new fingerprint would be believed once more."""
    edge = SettledTokens(UNCERTAINTIES)
    boast = Curve.empty()
    boast.add(0.5, 0.0, 1e6)
    first, later = f"{DRAFTS}/3fa4b1.09c2de", f"{DRAFTS}/f00baa.09c2de"
    assert edge.check("a", {}, {first: boast}).cut == ()
    for _ in range(100):
        edge.note("a", verdict(1, 1), "f00baa.09c2de")
    claim = edge.check("a", {}, {first: boast, later: boast})
    assert claim.curves[first].total_weight == pytest.approx(1e6)
    assert claim.curves[later].total_weight == pytest.approx(100 + SLACK_TOKENS)
