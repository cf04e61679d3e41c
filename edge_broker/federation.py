"""A cluster's part in the federation, without I/O: its members, what the edge saw of them, and the cloud's state."""

from functools import partial

from msgspec.structs import replace

from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.learning.federation import Members, Taken, mean_of_agents
from fedhlm.learning.learnt_state import State
from fedhlm.learning.orders import check_time
from fedhlm.learning.settled import SettledTokens
from fedhlm.protocol.messages import Contribution, Forget, Learned
from fedhlm.settings import Federation


class ClusterFederation:
    """The members, their accounts of verified tokens, and `above`: the latest state of the cloud's federation.

    Times are monotonic seconds (`now_s`) and Unix milliseconds (`wall_ms`) of this edge. Call `restored` once after the
    members were restored from disk.
    """

    def __init__(self, settings: Federation) -> None:
        self.members = Members(settings, mean_of_agents)
        self.settled = SettledTokens(UNCERTAINTIES)
        self.above: State | None = None
        self._above_ms = 0  # when it was published
        self._prior_tokens = settings.prior_tokens

    def restored(self) -> None:
        """Open accounts for forgotten members: what they contributed before the order stays forgotten."""
        for order in self.members.orders:
            if order.member not in self.members:
                self.settled.begin(order.member)

    def contribute(self, agent: str, contribution: Contribution, now_s: float, *, wall_ms: int) -> Taken:
        """Take an agent's contribution, cut to what is possible."""
        # An agent speaks for one agent only, whatever it claims. Privacy noise hides what it was really told.
        check = None if self.members.federation.epsilon else partial(self.settled.check, agent)
        return self.members.take(
            agent,
            replace(contribution, members=1),
            now_s,
            check,
            wall_ms=wall_ms,
            witnessed=partial(self.settled.witness, agent),
        )

    def obey(self, member: str, forget: Forget, *, wall_ms: int) -> bool:
        """Forget a member here, and the state of the cloud that may hold its sums. Returns False for a known order.

        Raises:
            ProtocolError: the order's time is more than a day ahead of this clock.
        """
        if not self.members.obey(member, forget, wall_ms=wall_ms):
            return False
        self.settled.begin(member)
        if self._above_ms < forget.sent_ms:
            self.above = None
        return True

    def note_above(self, learned: Learned, *, wall_ms: int) -> bool:
        """Take the cloud's state, unless it is from before an order to forget a member. Returns whether it is new.

        Raises:
            ProtocolError: a curve or a threshold is impossible, or the time is more than a day ahead.
        """
        check_time("learned", learned.sent_ms, wall_ms=wall_ms)
        above = State.of(learned)
        if learned.sent_ms < self.members.orders.since_ms:
            return False
        new = self.above is None or self.above.round != above.round
        self.above, self._above_ms = above, learned.sent_ms
        return new

    def state_below(self, state: State) -> State:
        """Return the cluster's state with the prior of the other clusters."""
        # Inherited sums include the cloud's share already.
        above = None if self.members.inherited_share else self.above
        return state.below(above, tokens=self._prior_tokens)

    def age(self, now_s: float) -> None:
        """Forget the members that have been silent for too long."""
        for agent in self.members.age(now_s):
            self.settled.forget(agent)

    def moved_away(self, agent: str) -> bool:
        """Drop the sums of an agent that now belongs to another cluster. Returns whether it was a member."""
        self.settled.forget(agent)
        return self.members.forget(agent)
