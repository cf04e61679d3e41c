"""Peers: who may settle what, when publishing pays, and keys that cannot be compared."""

from typing import Any

import numpy as np
import pytest

from edge_agent.events import Drafted, Observation
from edge_agent.peers import EXPLORED_SHARE, Peers
from fedhlm.config import load
from fedhlm.errors import ProtocolError
from fedhlm.peers.context_keys import DIMS
from fedhlm.protocol.messages import SCHEMA_VERSION, Uncertain, UncertainTokens, Verified, VerifiedTokens
from fedhlm.settings import Generation

HEADER: dict[str, Any] = {"version": SCHEMA_VERSION, "sequence": 1, "sent_ms": 0}
NEVER = 1.0


def key(number: int) -> bytes:
    vector = np.random.default_rng(number).standard_normal(DIMS)
    return np.rint(vector / np.linalg.norm(vector) * 127.0).astype(np.int8).tobytes()


def config(preset: str = "budget", **flags: object) -> Generation:
    named = {f"generation.{name.replace('__', '.')}": str(value) for name, value in flags.items()}
    return load(preset=preset, environ={}, flags=named).config.generation


def peers(*known: tuple[int, int]) -> Peers:
    """An agent `me` whose cluster has verified (key, token)."""
    view = Peers("me", lambda: 0.0, size=64, max_age_s=60.0, space="s")
    items = tuple(Verified(key(k), token) for k, token in known)
    view.hear_verified(VerifiedTokens(**HEADER, sender="edge", space="s", items=items))
    return view


def draft(token: int, number: int) -> Drafted:
    return Drafted(0, 5, token, 0.5, 0.9, b"", key(number))


def doubts(sender: str, *numbers: int, space: str = "s") -> UncertainTokens:
    items = tuple(Uncertain(1, 2, 0.9, key(n)) for n in numbers)
    return UncertainTokens(**HEADER, sender=sender, session=1, space=space, items=items)


def test_agreement_settles_and_another_token_never_does() -> None:
    consult = peers((1, 7)).consult(config(consensus__votes=1), 0.9)
    agreed, differed = consult(draft(7, 1)), consult(draft(8, 1))
    assert agreed is not None
    assert differed is not None
    assert (agreed.token, agreed.adopt, agreed.source) == (7, True, "peer")
    assert agreed.score == pytest.approx(0.0, abs=1e-3)
    assert (differed.token, differed.adopt, differed.source) == (7, False, None)
    assert consult(draft(7, 2)) is None or not consult(draft(7, 2)).adopt  # type: ignore[union-attr]
    assert consult(draft(7, 1)._replace(key=b"")) is None


def test_another_token_may_become_the_draft_where_that_is_wanted_and_is_verified_then() -> None:
    consult = peers((1, 7)).consult(config(consensus__votes=1, consensus__replace=0.95), 0.9)
    proposal = consult(draft(8, 1))
    assert proposal is not None
    assert (proposal.token, proposal.adopt, proposal.source) == (7, True, None)


def test_without_evidence_or_where_everything_is_verified_nothing_is_settled() -> None:
    view = peers((1, 7))
    unproven = view.consult(config(consensus__votes=1), None)(draft(7, 1))
    verified = view.consult(config("exact", peers="neighbour", consensus__votes=1), 0.9)(draft(7, 1))
    assert unproven is not None
    assert not unproven.adopt
    assert verified is not None
    assert verified.source is None
    assert view.consult(config("exact"), None)(draft(7, 1)) is None


def test_the_published_rule_compares_with_the_others_only() -> None:
    view = peers()
    consult = view.consult(config("fedhlm"), 0.8)
    assert consult(draft(7, 1)) is None  # alone: escalate
    view.hear_doubts(doubts("me", 1))
    assert consult(draft(7, 1)) is None  # still alone
    view.hear_doubts(doubts("b", 1))
    near, far = consult(draft(7, 1)), consult(draft(7, 2))
    assert near is not None
    assert (near.token, near.adopt, near.source) == (7, True, "peer")
    assert far is not None
    assert not far.adopt


def test_keys_of_another_model_are_refused() -> None:
    view = peers()
    with pytest.raises(ProtocolError, match="message.space must be 's'.* \\(got 'x'\\)"):
        view.hear_doubts(doubts("b", 1, space="x"))
    with pytest.raises(ProtocolError, match="key"):
        view.hear_doubts(
            UncertainTokens(**HEADER, sender="b", session=1, space="s", items=(Uncertain(1, 2, 0.9, b"short"),))
        )
    assert view.centroid.peers == ()


def test_publishing_stops_where_it_does_not_pay_and_is_tried_again_now_and_then() -> None:
    settings = config(consensus__votes=1)
    view = peers((1, 7))
    assert view.asks(settings, NEVER)  # nothing is known of the prices
    known = view.collaboration["neighbour"]
    known.published(140)
    known.escalated(30.0)
    consult = view.consult(settings, None)
    for _ in range(2_000):
        consult(draft(8, 2))
    assert known.hit_ratio < 0.1
    assert not view.asks(settings, NEVER)
    assert view.asks(settings, EXPLORED_SHARE / 2)
    for _ in range(2_000):
        consult(draft(7, 1))
    assert view.asks(settings, NEVER)


def test_wrong_hits_stop_it_too() -> None:
    settings = config(consensus__votes=1)
    view = peers((1, 7))
    known = view.collaboration["neighbour"]
    known.published(140)
    known.escalated(30.0)
    consult = view.consult(settings, None)
    for _ in range(500):
        consult(draft(7, 1))
    assert view.asks(settings, NEVER)
    wrong = Observation(0.9, 0.0, 1.0, (0.05, 1.0), 0.0, "local", False, False)
    below = wrong._replace(match=(0.5, 1.0))
    for _ in range(500):
        view.learn(settings, below, None)
    assert view.asks(settings, NEVER)  # a match that would not have been a hit
    for _ in range(500):
        view.learn(settings, wrong, None)
    assert not view.asks(settings, NEVER)


def test_a_match_exactly_as_near_as_asked_for_is_a_hit() -> None:
    """The border belongs to the hit, for what settles, for what is counted and for what replaces a draft."""
    view = peers((1, 7))
    match = view.memory.nearest(np.frombuffer(key(1), np.int8), 1)
    assert match is not None
    border, beyond = match.similarity, float(np.nextafter(match.similarity, 2.0))
    for theta, hit in ((border, True), (beyond, False)):
        settings = config(consensus__votes=1, consensus__replace=min(1.0, theta))
        agreed = view.consult(settings, theta)(draft(7, 1))
        assert agreed is not None
        assert agreed.adopt is hit
        differed = view.consult(settings, theta)(draft(8, 1))
        assert differed is not None
        assert (differed.token, differed.source) == (7, None)
        assert differed.adopt is hit
