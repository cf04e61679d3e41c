"""A round of learning among members, which are agents at an edge or clusters at the cloud; no I/O.

Members send all their sums, so the pool is made of the latest contribution of every member. The next contribution makes
up for repeated and lost ones. A contribution that breaks a limit is rejected and counted, and never kept.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from fedhlm.errors import ProtocolError
from fedhlm.learning.curve import Curve
from fedhlm.learning.evidence import FleetEvidence, SavedEvidence, Witnessed
from fedhlm.learning.learnt_state import State, check_thresholds, curves_of
from fedhlm.learning.member import KnownMember
from fedhlm.learning.orders import Obeyed, Orders, check_time
from fedhlm.learning.robust import honest_median, near_median, pool, winsorised
from fedhlm.learning.settled import Claim
from fedhlm.learning.thresholds import PaperUpdate, cluster_mean, global_mean, mean_control
from fedhlm.protocol.fields import MAX_CURVES, MAX_PAIRS, Count, Name, Pair
from fedhlm.protocol.fingerprint import half_of, large_of, pair_in
from fedhlm.protocol.messages import SCHEMA_VERSION, Contribution, Fingerprint, Forget, Learned, PaperThreshold
from fedhlm.protocol.packing import check_saved_version
from fedhlm.settings import Federation
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

MEMBERS_MAX: Final = 4_096
OVERTAKEN_S: Final = 300.0  # no message arrives this long after one that was sent later
LEAP: Final = 65_536  # rounds; more than a month of them
_COUNT_END: Final = 2**31
_VERSION: Final = 2

Check = Callable[[Mapping[Pair, PaperThreshold], Mapping[str, Curve], Mapping[str, Curve] | None], Claim]
"""Cuts a contribution's thresholds and curves to what is possible, given the member's known curves.

`settled.SettledTokens.check` is such a function.
"""

Mean = Callable[[Sequence[PaperUpdate], Sequence[PaperUpdate]], float | None]
Taken = Literal["taken", "duplicate", "refused"]


def mean_of_agents(fresh: Sequence[PaperUpdate], _known: Sequence[PaperUpdate]) -> float | None:
    """FedHLM eq. (7): the mean threshold of the members that contributed to this round, weighted by their tokens."""
    return cluster_mean(fresh)


def mean_of_clusters(_fresh: Sequence[PaperUpdate], known: Sequence[PaperUpdate]) -> float | None:
    """FedHLM eq. (8): the plain mean of the thresholds of all clusters."""
    return global_mean([update.threshold for update in known])


def guarded(updates: Sequence[PaperUpdate], trim: float, highest: float = math.inf) -> list[PaperUpdate]:
    """Make updates safe for the published averages.

    Counts are cut near the median count, and thresholds to `highest`. From five updates on, thresholds and controls are
    winsorised: the share `trim` at either end is moved to the nearest value that is kept.
    """
    most = near_median([float(update.count) for update in updates])
    thresholds = winsorised([update.threshold for update in updates], trim=trim)
    controls = winsorised([update.control for update in updates], trim=trim)
    return [
        update._replace(threshold=min(threshold, highest), control=control, count=int(min(update.count, most)))
        for update, threshold, control in zip(updates, thresholds, controls, strict=True)
    ]


def highest_of(thresholds: Sequence[float], silent: int, old: PaperThreshold | None) -> float | None:
    """The most that a published threshold of a cluster may count for; None where none may count yet.

    A threshold of the published rule only rises, so a liar gains by a high one. No member counts for more than the
    median of the lowest majority (`honest_median`). So that liars cannot be the first to contribute, `silent` ones
    stand for the `old` threshold of the cluster. Where there is none, they stand for the lowest contributed one, and
    more than half of the cluster must have contributed.

    As long as fewer than half are dishonest, or one of two, the limit is at most the threshold of some honest member,
    or the old one. Where all lies are high, it is at most the median of the honest thresholds, silent ones included.
    """
    if old is None and len(thresholds) <= silent:
        return None
    rest = min(thresholds, default=math.inf) if old is None else old.threshold
    return honest_median([*thresholds, *[rest] * silent])


class _Saved(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    schema: int
    round: Count
    thresholds: dict[Pair, PaperThreshold]
    inherited: Learned | None
    members: list[tuple[Name, Contribution]]
    silent_s: dict[Name, float] = {}
    orders: list[Obeyed] = []
    evidence: SavedEvidence = SavedEvidence()


_saved: Final = msgspec.msgpack.Decoder(_Saved)


class Members:
    """The latest contribution of every member, and the rounds that are made from them.

    A round is due after `round_updates` new contributions, or `round_s` seconds after the first one. Above MEMBERS_MAX
    members, the one that has been silent for longest is forgotten. `refused` counts rejected contributions by reason,
    and `blamed` rejected and cut ones by member. With `of_clusters`, a member is a whole cluster.
    """

    def __init__(self, federation: Federation, mean: Mean, *, of_clusters: bool = False) -> None:
        self.round = 0
        self.orders = Orders()
        self.refused: Counter[str] = Counter()
        self.blamed: dict[str, Counter[str]] = {}
        self.cut = 0
        self._of_clusters = of_clusters
        self._born: set[str] = set()
        self._heard_s: dict[str, float] = {}
        self._silent_before: dict[str, float] = {}  # seconds of silence of members in an earlier life of this part
        self._now_s = -math.inf  # the latest time that was seen
        self.federation = federation
        self.evidence = FleetEvidence()
        self._mean = mean
        self._members: dict[str, KnownMember] = {}  # the member that has been silent for longest comes first
        self._fresh: set[str] = set()
        self._first_s: float | None = None
        self._told = False
        self._grown = False
        self._thresholds: dict[Pair, PaperThreshold] = {}
        self._inherited: State | None = None
        self._inherited_ms = 0  # when it was published

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def fresh(self) -> int:
        """The number of members that contributed since the last round."""
        return len(self._fresh)

    @property
    def grown(self) -> bool:
        """Whether the pool has changed since the last round."""
        return self._grown

    @property
    def told(self) -> bool:
        """Whether a round was made or restored from disk, so that there is a state to publish again."""
        return self._told

    def take(
        self,
        name: str,
        message: Contribution,
        now_s: float,
        check: Check | None = None,
        *,
        wall_ms: int | None = None,
        witnessed: Witnessed | None = None,
    ) -> Taken:
        """Keep a member's contribution if it is valid and later than the known one.

        `check` cuts impossible claims; `cut` counts such contributions. `witnessed` limits what its evidence may claim.
        `wall_ms` is the Unix time of this part in
        milliseconds. A contribution is rejected if its time is more than a day ahead of it, or if its round is more
        than LEAP above the known one.

        A contribution need not be later than the known one if the member was started again (`born`), or if it was
        silent for more than OVERTAKEN_S seconds. `now_s` is monotonic time in seconds.
        """
        self._see(now_s)
        known = self._members.get(name)
        anew = known is None or name in self._born or self.silent_s(name) > OVERTAKEN_S
        if known is not None and (known.repeats(message) or not (anew or known.precedes(message))):
            return "duplicate"
        reason = "time"
        try:
            if wall_ms is not None:
                check_time("contribution", message.sent_ms, wall_ms=wall_ms)
            reason = "forgotten"
            if self._of_clusters and message.sent_ms < self.orders.since_ms:
                raise ProtocolError("contribution.sent_ms must not be before the latest order to forget a member")
            reason = "round"
            if known is not None and not anew and message.round - known.message.round > LEAP:
                raise ProtocolError(
                    f"contribution.round must be at most {LEAP} above {known.message.round} (got {message.round})"
                )
            reason = "threshold"
            check_thresholds(message.thresholds)
            reason = "curve"
            curves = curves_of(message)
            reason = "evidence"
            if message.evidence is not None:
                before = self.evidence.cut
                self.evidence.hear(name, message.evidence, witnessed)
                if self.evidence.cut > before:
                    warn_once(log, f"{name} cut evidence", "cut the evidence of %s to what its verdicts show", name)
        except ProtocolError as exc:
            self.refused[reason] += 1
            self._blame(name, reason)
            warn_once(log, f"{name} {reason}", "refused a contribution of %s: %s", name, exc)
            return "refused"
        if check is not None:
            claim = check(message.thresholds, curves, None if known is None else known.curves)
            if claim.cut:
                self.cut += 1
                self._blame(name, "cut")
                warn_once(log, f"{name} cut", "cut a contribution of %s: it %s", name, "; ".join(claim.cut))
                curves = dict(claim.curves)
                packed = {measure: curve.to_bytes() for measure, curve in curves.items()}
                message = replace(message, thresholds=dict(claim.thresholds), curves=packed)
        self._born.discard(name)
        self._heard_s[name] = now_s
        self._members.pop(name, None)
        self._members[name] = KnownMember(message, curves)
        if len(self._members) > MEMBERS_MAX:
            self.forget(next(iter(self._members)))
        self._fresh.add(name)
        self._grown = True
        self.touch(now_s)
        return "taken"

    def forget(self, name: str) -> bool:
        """Drop a member that contributes elsewhere now. Returns whether it was known.

        Its evidence stays: what it has done here has been done.
        """
        self._fresh.discard(name)
        self._born.discard(name)
        self._heard_s.pop(name, None)
        known = self._members.pop(name, None) is not None
        self._grown |= known
        return known

    def obey(self, name: str, forget: Forget, *, wall_ms: int) -> bool:
        """Forget a member, and the inherited state that may hold its sums, by an operator's order. A round is then due.

        Where a member is a whole cluster, an order about any of its agents drops each contribution that was made
        before it. Returns False for an order that was obeyed before.

        Raises:
            ProtocolError: the order's time is more than a day ahead of this clock.
        """
        if not self.orders.take(name, forget, wall_ms=wall_ms):
            return False
        made_ms = {other: member.message.sent_ms for other, member in self._members.items() if self._of_clusters}
        older = [other for other, at_ms in made_ms.items() if at_ms < forget.sent_ms]
        self.evidence.forget(name)  # the clusters' evidence shrinks by itself, with their next contributions
        for gone in (name, *older):
            self.forget(gone)
        stale = self._inherited is not None and self._inherited_ms < forget.sent_ms
        if stale:
            self._inherited = None
        self._thresholds.clear()
        self._grown |= bool(self._members)  # the cloud has dropped what was sent before the order
        self.blamed.pop(name, None)
        if self._told or older or stale:
            self._first_s = -math.inf
        log.info("forgot what %s contributed: an operator's order", name)
        return True

    def known(self) -> Iterator[tuple[str, Contribution, Mapping[str, Curve]]]:
        """Yield each member's name, latest contribution and curves."""
        for name, member in self._members.items():
            yield name, member.message, member.curves

    def _blame(self, name: str, reason: str) -> None:
        self.blamed.setdefault(name, Counter())[reason] += 1
        if len(self.blamed) > MEMBERS_MAX:
            del self.blamed[next(iter(self.blamed))]

    def born(self, name: str) -> None:
        """Note that a member was started again. Its next contribution counts, whatever its time and round."""
        if name in self._members:
            self._born.add(name)

    def silent_s(self, name: str) -> float:
        """Seconds for which nothing was heard of a member. Only time in which this part was running counts."""
        heard_s = self._heard_s.get(name)
        return 0.0 if heard_s is None else self._now_s - heard_s

    def _see(self, now_s: float) -> None:
        """Set the time, and turn silences of an earlier life into times of this one."""
        self._now_s = max(now_s, self._now_s)
        for name, silent_s in self._silent_before.items():
            self._heard_s.setdefault(name, self._now_s - silent_s)
        self._silent_before.clear()

    def age(self, now_s: float) -> list[str]:
        """Drop the members that have been silent for longer than `federation.silence_s`. Returns their names."""
        self._see(now_s)
        old = [name for name in self._members if self.silent_s(name) > self.federation.silence_s]
        for name in old:
            self.forget(name)
            log.info("forgot the contribution of %s: it was silent for %.0f s", name, self.federation.silence_s)
        return old

    def touch(self, now_s: float) -> None:
        """Make a round due within `round_s`, without a new contribution."""
        if self._first_s is None:
            self._first_s = now_s

    def inherit(self, message: Learned, *, wall_ms: int | None = None) -> bool:
        """Start from the retained state of an earlier life of this part. Returns whether it was used.

        The evidence in the state must be this part's own, and no more.

        The state stands for the members that have not contributed again yet, and loses weight as they contribute. A
        restart therefore does not lose what the pool knew. Once this part has made or restored a round, the retained
        state is its own and is ignored. A state from before an order to forget a member is ignored too, and a round is
        due that replaces it. `wall_ms` is as for `take`.

        Raises:
            ProtocolError: a curve or the control variate is impossible, or the time is more than a day ahead.
        """
        if wall_ms is not None:
            check_time("learned", message.sent_ms, wall_ms=wall_ms)
        if self._told or self._inherited is not None or not message.members:
            return False
        state = State.of(message)
        self.round = max(self.round, state.round)
        if message.sent_ms < self.orders.since_ms:
            self._first_s = -math.inf
            return False
        self.evidence.inherit(message.evidence)
        self._inherited, self._inherited_ms = state, message.sent_ms
        self._thresholds = {**state.thresholds, **self._thresholds}
        return True

    def note_large(self, large: Fingerprint) -> None:
        """Say in the log which sums are about other LLMs than this one. They are kept apart and rule nothing."""
        pairs = {
            pair
            for member in self._members.values()
            for pair in (*map(pair_in, member.curves), *member.message.thresholds)
        }
        other = sorted(pair for pair in pairs if large_of(pair) not in ("", half_of(large)))
        if other:
            log.warning(
                "the large model is now %s: what was learnt about %s with another one is set aside until it comes back",
                large.model,
                ", ".join(f"pair {pair}" for pair in other),
            )

    def due_s(self) -> float | None:
        """The time at which the next round is due, on the clock of `take`; None while there is nothing new."""
        if self._first_s is None:
            return None
        return -math.inf if self.fresh >= self.federation.round_updates else self._first_s + self.federation.round_s

    def due(self, now_s: float) -> bool:
        """Whether a round is due."""
        at_s = self.due_s()
        return at_s is not None and now_s >= at_s

    def close(self, present: Collection[str] = ()) -> State:
        """End the round and return the new state. `present` are the names of the agents that are online."""
        voters = Counter(pair for member in self._members.values() for pair in member.message.thresholds)
        # Only dishonest members name more pairs than a message holds. Keep those that most members have.
        pairs = sorted({*voters, *self._thresholds}, key=lambda pair: (-voters[pair], pair))[:MAX_PAIRS]
        closed = {pair: self._threshold(pair, present) for pair in pairs}
        self._thresholds = {pair: threshold for pair, threshold in closed.items() if threshold is not None}
        self.round = (self.round + 1) % _COUNT_END
        self._fresh.clear()
        self._first_s = None
        self._told, self._grown = True, False
        return self.state()

    def _threshold(self, pair: Pair, present: Collection[str]) -> PaperThreshold | None:
        """The threshold of a pair after this round."""
        fresh, known = self._updates(self._fresh, pair), self._updates(self._members, pair)
        old = self._thresholds.get(pair)
        highest: float | None = math.inf  # clusters may differ by right
        if not self._of_clusters:
            silent = sum(pair not in self._thresholds_of(name) for name in present)
            highest = highest_of([update.threshold for update in known], silent, old)
        mean = None
        if highest is not None:
            fresh, known = (guarded(updates, self.federation.trim, highest) for updates in (fresh, known))
            mean = self._mean(fresh, known)
        if mean is not None:
            count = min(_COUNT_END - 1, sum(update.count for update in fresh))
            steps = max((update.steps for update in fresh), default=0)
            return PaperThreshold(mean, count, mean_control(known), steps)
        if old is not None:
            return PaperThreshold(old.threshold, 0, mean_control(known) if known else old.control, 0)
        return None

    def _thresholds_of(self, name: str) -> Mapping[Pair, PaperThreshold]:
        member = self._members.get(name)
        return {} if member is None else member.message.thresholds

    def state(self) -> State:
        """The pool over all known members, with the thresholds of the last round."""
        counted = sum(member.message.members for member in self._members.values())
        agents = {name: member.message.members for name, member in self._members.items()}
        share = self.inherited_share
        by_measure: dict[str, dict[str, Curve]] = {}
        for name, member in self._members.items():
            for measure, curve in member.curves.items():
                by_measure.setdefault(measure, {})[name] = curve
        held = self._inherited.curves if self._inherited is not None and share else {}
        curves: dict[str, Curve] = {}
        refused = sum(self.refused.values())
        # Only dishonest members send more measures than a message holds. Keep those that most members contribute.
        names = sorted({*by_measure, *held}, key=lambda m: (-len(by_measure.get(m, ())), m not in held, m))
        for measure in names[:MAX_CURVES]:
            pooled = pool(
                by_measure.get(measure, {}),
                weight_cap=self.federation.weight_cap,
                trim=self.federation.trim,
                agents=agents,
            )
            refused += len(pooled.refused)
            rest = held[measure].scaled(share) if measure in held else Curve.empty()
            curves[measure] = pooled.curve + rest
        absent = round(share * self._inherited.members) if self._inherited is not None else 0
        clipped = min(_COUNT_END - 1, counted + absent), min(_COUNT_END - 1, refused)
        return State(self.round, *clipped, dict(self._thresholds), curves, self.evidence.message())

    @property
    def inherited_share(self) -> float:
        """The share of the inherited state that stands for members that have not contributed again, from 1 to 0."""
        if self._inherited is None:
            return 0.0
        counted = sum(member.message.members for member in self._members.values())
        return max(0.0, 1.0 - counted / max(1, self._inherited.members))

    def snapshot(self) -> bytes:
        """Encode everything except the counts of rejected contributions, for `restore`."""
        inherited = None
        if self._inherited is not None and self.inherited_share:
            header = {"version": SCHEMA_VERSION, "sender": "self", "sequence": 0, "sent_ms": self._inherited_ms}
            inherited = self._inherited.learned(header)
        members = [(name, replace(member.message, evidence=None)) for name, member in self._members.items()]
        silent = self._silent_before | {name: self.silent_s(name) for name in self._heard_s}
        return msgspec.msgpack.encode(
            _Saved(
                _VERSION,
                SCHEMA_VERSION,
                self.round,
                self._thresholds,
                inherited,
                members,
                silent,
                [*self.orders],
                self.evidence.snapshot(),
            )
        )

    def restore(self, data: bytes) -> None:
        """Replace the members and rounds by those of a snapshot.

        Raises:
            ProtocolError: the bytes are no snapshot of this version, or hold something that `take` would reject.
                Nothing has changed then.
        """
        check_saved_version(data, _VERSION, what="the federation snapshot")
        try:
            saved = _saved.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ProtocolError(f"federation snapshot cannot be decoded: {exc}") from exc
        if saved.schema != SCHEMA_VERSION:
            raise ProtocolError(f"schema of the federation snapshot must be {SCHEMA_VERSION} (got {saved.schema})")
        for thresholds in (saved.thresholds, *(message.thresholds for _, message in saved.members)):
            check_thresholds(thresholds)
        members = {name: KnownMember(message, curves_of(message)) for name, message in saved.members[-MEMBERS_MAX:]}
        inherited = None if saved.inherited is None else State.of(saved.inherited)
        self.evidence.restore(saved.evidence)
        # The monotonic clocks of two processes are unrelated, so earlier silences continue from now.
        self._now_s = -math.inf
        self._heard_s = {}
        self._silent_before = {name: max(0.0, saved.silent_s.get(name, 0.0)) for name in members}
        self._inherited = inherited
        self._inherited_ms = 0 if saved.inherited is None else saved.inherited.sent_ms
        self.orders = Orders(saved.orders)
        self._members, self.round, self._thresholds = members, saved.round, saved.thresholds
        # A part without members or rounds on disk has no state to publish, and inherits the retained one.
        self._told = bool(members or saved.round or saved.inherited is not None)

    def _updates(self, names: "set[str] | dict[str, KnownMember]", pair: Pair) -> list[PaperUpdate]:
        found = (self._members[name].update(pair) for name in sorted(names))
        return [update for update in found if update is not None]
