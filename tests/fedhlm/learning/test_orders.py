"""Orders to forget a member: each is obeyed once, the latest one counts, and nothing that was made before it comes back."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from edge_broker.federation import ClusterFederation
from fedhlm.errors import ProtocolError
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.curve import Curve
from fedhlm.learning.federation import Members, mean_of_agents, mean_of_clusters
from fedhlm.learning.orders import FUTURE_MS, ORDERS_MAX, Orders
from fedhlm.learning.roster import roster_of
from fedhlm.learning.settled import SLACK_TOKENS, SettledTokens
from fedhlm.protocol.fields import MAX_ROSTER
from fedhlm.protocol.messages import Contribution, Evidence, Forget, Learned
from fedhlm.settings import Federation

NOW_MS = 10 * FUTURE_MS
PAIR = "3fa4b1.09c2de"


def header(sent_ms: int = NOW_MS, sequence: int = 0) -> dict[str, object]:
    return {"version": 3, "sender": "x", "sequence": sequence, "sent_ms": sent_ms}


def order(number: int, sent_ms: int = NOW_MS) -> Forget:
    return Forget(**header(sent_ms), order=number)  # type: ignore[arg-type]


def packed(tokens: float) -> dict[str, bytes]:
    made = Curve.empty()
    made.add(0.3, 0.5, tokens)
    return {"u": made.to_bytes()}


def contribution(tokens: float, number: int = 1, sent_ms: int = NOW_MS, members: int = 1) -> Contribution:
    return Contribution(**header(sent_ms, number), round=number, members=members, curves=packed(tokens))  # type: ignore[arg-type]


def tokens(members: Members) -> float:
    state = members.state()
    return state.curves["u"].total_weight if "u" in state.curves else 0.0


def test_an_order_is_obeyed_once_and_an_older_one_never() -> None:
    orders = Orders()
    assert orders.take("a", order(1), wall_ms=NOW_MS)
    assert not orders.take("a", order(1), wall_ms=NOW_MS)
    assert not orders.take("a", order(2, NOW_MS - 1), wall_ms=NOW_MS)
    assert orders.take("a", order(3, NOW_MS + 1), wall_ms=NOW_MS)
    assert Orders([*orders]).latest == orders.latest == (3,)
    assert Orders([*orders]).since_ms == NOW_MS + 1


def test_an_order_from_far_in_the_future_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"forget.sent_ms must be at most a day ahead of this clock \(got 2 days\)"):
        Orders().take("a", order(1, NOW_MS + 2 * FUTURE_MS), wall_ms=NOW_MS)


def test_orders_are_bounded_and_their_time_stays() -> None:
    orders = Orders()
    for i in range(ORDERS_MAX + 5):
        orders.take(f"a{i}", order(i, NOW_MS - i), wall_ms=NOW_MS)
    assert len([*orders]) == ORDERS_MAX
    assert orders.since_ms == NOW_MS
    assert orders.stamped({"sent_ms": 5}) == {"sent_ms": NOW_MS}
    assert orders.stamped({"sent_ms": NOW_MS + 5}) == {"sent_ms": NOW_MS + 5}


def test_a_forgotten_member_counts_no_more_and_its_next_contribution_does() -> None:
    members = Members(Federation(), mean_of_agents)
    for name in "ab":
        members.take(name, contribution(100.0), 0.0)
    members.close()
    assert members.obey("a", order(1), wall_ms=NOW_MS)
    assert members.due(-1e9), "the new state is published at once"
    assert tokens(members) == 100.0
    again = Members(Federation(), mean_of_agents)
    again.restore(members.snapshot())
    assert not again.obey("a", order(1), wall_ms=NOW_MS), "the order is remembered on disk"
    assert again.take("a", contribution(70.0), 0.0) == "taken"
    assert tokens(again) == 170.0


@pytest.mark.parametrize("order_first", [True, False])
def test_inherited_state_from_before_the_order_is_dropped_and_replaced(order_first: bool) -> None:
    def learned(sent_ms: int) -> Learned:
        return Learned(**header(sent_ms), round=7, members=2, curves=packed(100.0))  # type: ignore[arg-type]

    def steps(sent_ms: int) -> Members:
        members = Members(Federation(), mean_of_agents)
        acts: list[Callable[[], bool]] = [
            lambda: members.obey("a", order(1), wall_ms=NOW_MS),
            lambda: members.inherit(learned(sent_ms), wall_ms=NOW_MS),
        ]
        for act in acts if order_first else reversed(acts):
            act()
        return members

    before, after = steps(NOW_MS - 1), steps(NOW_MS)
    assert (tokens(before), tokens(after)) == (0.0, 100.0)
    assert before.due(-1e9), "the retained lie is written over at once"
    assert not after.due(-1e9), "nothing poorer is published"
    assert before.round == 7


def test_learnt_state_from_far_in_the_future_is_refused() -> None:
    members = Members(Federation(), mean_of_agents)
    with pytest.raises(ProtocolError, match=r"learned.sent_ms must be at most a day ahead"):
        members.inherit(
            Learned(**header(2**53 - 1), round=1, members=1, curves=packed(1.0)),  # type: ignore[arg-type]
            wall_ms=NOW_MS,
        )


def test_among_clusters_all_that_was_made_before_the_order_goes() -> None:
    members = Members(Federation(), mean_of_clusters, of_clusters=True)
    members.take("c1", contribution(100.0, sent_ms=NOW_MS - 5), 0.0)
    members.take("c2", contribution(50.0, sent_ms=NOW_MS + 5), 0.0)
    members.obey("liar", order(1), wall_ms=NOW_MS)
    assert tokens(members) == 50.0
    assert members.take("c1", contribution(100.0, 2, NOW_MS - 1), 0.0) == "refused", "it was on its way"
    assert members.refused["forgotten"] == 1
    assert members.take("c1", contribution(90.0, 3, NOW_MS), 0.0) == "taken"
    assert tokens(members) == 140.0


def test_a_forgotten_members_evidence_goes_with_its_sums() -> None:
    members = Members(Federation(), mean_of_agents)
    members.evidence.begin(NOW_MS)
    for name, written in (("a", 300), ("b", 200)):
        known = Certificate()
        known.add(written, [1.0])
        evidence = Evidence(NOW_MS, {PAIR: known.to_bytes()})
        members.take(name, replace(contribution(1.0), evidence=evidence), 0.0)
    assert members.evidence.totals()[PAIR].tokens == 500.0
    assert members.obey("a", order(1), wall_ms=NOW_MS)
    assert members.evidence.totals()[PAIR].tokens == 200.0


@pytest.mark.parametrize("restarted", [False, True])
def test_an_edge_lets_a_forgotten_agent_begin_with_nothing(restarted: bool) -> None:
    """What it contributed before the order does not come back with its next contribution, which holds all its sums."""
    edge = ClusterFederation(Federation())
    edge.contribute("a", contribution(5_000.0), 0.0, wall_ms=NOW_MS)
    assert tokens(edge.members) == 5_000.0
    edge.obey("a", order(1), wall_ms=NOW_MS)
    if restarted:
        saved, edge = edge.members.snapshot(), ClusterFederation(Federation())
        edge.members.restore(saved)
        edge.restored()
    edge.contribute("a", contribution(5_100.0, 2, NOW_MS + 1), 1.0, wall_ms=NOW_MS)
    assert tokens(edge.members) <= SLACK_TOKENS


def test_of_a_forgotten_member_only_tokens_that_pass_from_now_on_count() -> None:
    settled = SettledTokens({"u"})
    boast = {"u": Curve.from_bytes(packed(1e6)["u"])}
    assert settled.sums(settled.check("a", {}, boast).curves).tokens == pytest.approx(1e6), "a new edge believes it"
    settled.begin("a")
    assert settled.sums(settled.check("a", {}, boast).curves).tokens == pytest.approx(SLACK_TOKENS)


def test_the_roster_names_the_heaviest_and_who_was_refused() -> None:
    members = Members(Federation(), mean_of_agents)
    for i in range(MAX_ROSTER + 3):
        members.take(f"a{i}", contribution(float(i + 1)), 0.0)
    members.take("a9", contribution(1.0, 2, 2**53 - 1), 4.0, wall_ms=NOW_MS)
    members.take("liar", contribution(1.0, 2, 2**53 - 1), 5.0, wall_ms=NOW_MS)
    members.obey("gone", order(77), wall_ms=NOW_MS)
    roster = roster_of(members, header())
    assert (len(roster.members), roster.left_out) == (MAX_ROSTER, 4)
    heaviest = roster.members[0]
    assert (heaviest.name, heaviest.weight, heaviest.harm) == (
        f"a{MAX_ROSTER + 2}",
        MAX_ROSTER + 3,
        (MAX_ROSTER + 3) / 2,
    )
    assert heaviest.silent_s == 5.0
    assert roster.obeyed == (77,)
    assert next(row for row in roster.members if row.name == "a9").blamed == {"time": 1}
    assert members.blamed["liar"] == {"time": 1}
