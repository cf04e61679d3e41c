"""The fleet's certificate: the evidence of all members, by pair of models, held to what was witnessed; no I/O.

Members send the whole sums of their evidence. A device that loses its disk begins a new evidence, and what it claimed
before stays. Where there is a witness, a member counts for no more tokens and no less harm than the witness saw
(docs/budget.md).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from fedhlm.learning.certificate import AUDIT_CHANCES, Certificate
from fedhlm.protocol.fields import MAX_PAIRS, LogSums, Milliseconds, Name, Pair
from fedhlm.protocol.fingerprint import large_of
from fedhlm.protocol.messages import Evidence
from fedhlm.telemetry import Counters

ACCOUNTS_MAX: Final = 4_096  # beyond this number the sums of the most silent member lose its name
ELSEWHERE: Final = 2.0  # a first claim of more than this many times the witnessed tokens was not made here
ELSEWHERE_TOKENS: Final = 64.0  # and of so many tokens more
CUT: Final = 1.25  # a claim counts as cut if its limit rises by more, beyond the luck of an honest device's coins
LUCK: Final = 4.0  # standard errors of what audits show of the tokens that nobody scored
CUT_CONFIDENCE: Final = 0.95  # of the limits that are compared for that


class Witness(NamedTuple):
    """What passed by of one member's tokens.

    Verdicts committed or scored `settled` tokens, audits aside, and the LLM would have written `wrong` of them
    otherwise. Audits scored `audited` tokens, `audited_wrong` of them wrong. These stand for at most `tails` tokens:
    an audited tail counts by the inverse of the least probability of its audit.
    """

    settled: float = 0.0
    wrong: float = 0.0
    audited: float = 0.0
    audited_wrong: float = 0.0
    tails: float = 0.0

    @property
    def tokens(self) -> float:
        """The most tokens that the member can have committed, up to the luck of its coins."""
        return self.settled + self.tails

    def limited(self, claim: Certificate) -> Certificate:
        """Cut a claim to what was seen. Its limit does not fall by that, and neither does that of a sum with it.

        Tokens are at most `tokens`. Harm is at least what was seen, where that of audits grows with the number of
        tokens that the member claims for its tails; it is at most one for each token.
        """
        return self._bounded(claim, self.tokens, math.inf)

    def possible(self, claim: Certificate) -> Certificate:
        """Cut a claim to what an honest member with unlucky coins can have had.

        An audited tail of n tokens stands for n / p of them, where p is about n times the least chance of a token. So
        the number of tokens that audits show has a variance of at most one over that chance for each token.
        """
        unscored = max(0.0, claim.tokens - self.settled)
        most = self.tokens + LUCK * math.sqrt(unscored / AUDIT_CHANCES[0])
        return self._bounded(claim, most, 1.0 / AUDIT_CHANCES[0])

    def _bounded(self, claim: Certificate, most_tokens: float, most_for_one: float) -> Certificate:
        tokens = min(claim.tokens, most_tokens)
        stands_for = max(1.0, (tokens - self.settled) / self.audited) if self.audited else 1.0
        stands_for = min(stands_for, most_for_one)
        return claim.bounded(tokens, min(tokens, self.wrong + stands_for * self.audited_wrong))


Witnessed = Callable[[Pair], Witness]
"""What was seen of a member's tokens under a pair of models."""


@dataclass
class Account:
    """The evidence of one member about one pair.

    `claim` is the latest one of the evidence that began at `began_ms`; what it adds to `base` counts, as `counted`.
    `closed` counted from earlier evidence of the same witness, and `held` before that.
    """

    began_ms: int
    base: Certificate
    claim: Certificate = field(default_factory=Certificate)
    counted: Certificate = field(default_factory=Certificate)
    closed: Certificate = field(default_factory=Certificate)
    held: Certificate = field(default_factory=Certificate)
    seen: float = 0.0  # tokens that the witness had seen

    def total(self) -> Certificate:
        """All that counts."""
        return self.held + self.closed + self.counted

    def begin(self, began_ms: int, base: Certificate) -> None:
        """Close the present evidence: another one counts from `base` on."""
        self.closed += self.counted
        self.began_ms, self.base, self.claim, self.counted = began_ms, base, base, Certificate()

    def renew(self) -> None:
        """Start with a new witness, who has seen nothing yet."""
        self.held, self.closed, self.counted = self.total(), Certificate(), Certificate()
        self.base, self.seen = self.claim, 0.0


class SavedAccount(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An account as it is saved."""

    began_ms: Milliseconds
    claim: LogSums
    total: LogSums


class SavedEvidence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The evidence of a fleet as it is saved: the accounts by member and pair, and what belongs to no member."""

    began_ms: Milliseconds | None = None
    accounts: dict[Name, dict[Pair, SavedAccount]] = {}
    rest: dict[Pair, LogSums] = {}
    joined: Annotated[int, Meta(ge=0)] = 0
    inherited: bool = False


class FleetEvidence:
    """The evidence of a fleet. Members that left still count here for what they did here, until they are forgotten.

    `cut` counts claims whose limit rose by more than a quarter when they were held to what was witnessed, and to the
    worst luck of an honest member's coins.
    """

    def __init__(self) -> None:
        self.cut = 0
        self.began_ms: int | None = None
        self._accounts: dict[str, dict[Pair, Account]] = {}
        self._rest: dict[Pair, Certificate] = {}
        self._joined = 0  # members so far
        self._inherited = False

    def begin(self, wall_ms: int) -> None:
        """Begin, unless this evidence was restored or inherited. `wall_ms` is the Unix time in milliseconds."""
        if self.began_ms is None:
            self.began_ms = wall_ms

    def hear(self, name: str, evidence: Evidence, witnessed: Witnessed | None = None) -> None:
        """Take a member's whole sums. Without a witness they count as they are.

        A claim that is new here begins with nothing, or from itself if more was claimed than can have been seen here:
        what others have witnessed counts where they are. The same holds where this part inherited its sums.

        Raises:
            ProtocolError: the sums are impossible. Nothing changes then.
        """
        claims = {pair: Certificate.from_bytes(data) for pair, data in evidence.sums.items()}
        accounts = self._accounts.pop(name, None)
        if accounts is None:
            accounts = {}
            self._joined += 1
        self._accounts[name] = accounts  # the member that has been silent for longest comes first
        for pair, claim in claims.items():
            self._hear(accounts, pair, claim, evidence.began_ms, witnessed and witnessed(pair))
        while len(self._accounts) > ACCOUNTS_MAX:
            for pair, account in self._accounts.pop(next(iter(self._accounts))).items():
                self._keep(pair, account)

    def _hear(
        self, accounts: dict[Pair, Account], pair: Pair, claim: Certificate, began_ms: int, seen: Witness | None
    ) -> None:
        account = accounts.get(pair)
        if account is None:
            account = accounts[pair] = Account(began_ms, Certificate())
            begin = Certificate() if seen is not None or not self._inherited else claim
            account.begin(began_ms, _base(claim, begin, seen))
        elif account.began_ms != began_ms:
            rest = seen and seen._replace(settled=seen.settled - account.closed.tokens - account.counted.tokens)
            account.begin(began_ms, _base(claim, Certificate(), rest))
        elif seen is not None and claim.tokens < account.claim.tokens:
            account.begin(began_ms, claim)  # the member went back to an older state
        elif seen is not None and (seen.tokens < account.seen or not account.seen):
            account.renew()  # another witness, or one that has forgotten what it saw
            account.base = _base(claim, account.base, seen)
        account.claim = claim
        account.counted = claim - account.base
        if seen is not None:
            account.seen = seen.tokens
            claimed = account.closed + account.counted
            self.cut += seen.possible(claimed).limit(CUT_CONFIDENCE) > CUT * claimed.limit(CUT_CONFIDENCE)
            account.counted = seen.limited(claimed) - account.closed
        while len(accounts) > MAX_PAIRS:
            oldest = next(iter(accounts))
            self._keep(oldest, accounts.pop(oldest))

    def _keep(self, pair: Pair, account: Account) -> None:
        self._rest[pair] = self._rest.get(pair, Certificate()) + account.total()

    def forget(self, name: str) -> bool:
        """Remove a member's sums, and pay for the choice. Returns whether it had any.

        Whoever forgets may have looked at the sums first. The sums without the j-th member are evidence for each j, so
        those without the chosen one are so at the error probability times 1 / (j (j + 1)), which sums to 1 over all j.
        """
        accounts = self._accounts.pop(name, {})
        for pair in accounts:
            self._rest[pair] = self._rest.get(pair, Certificate()).dearer(self._joined * (self._joined + 1.0))
        return bool(accounts)

    def inherit(self, evidence: Evidence | None) -> None:
        """Continue a retained state. What members claim from now on counts by what they add.

        Raises:
            ProtocolError: the sums are impossible.
        """
        if evidence is not None and not self._accounts and not self._rest:
            self._rest = {pair: Certificate.from_bytes(data) for pair, data in evidence.sums.items()}
            self.began_ms, self._inherited = evidence.began_ms, True

    def totals(self) -> dict[Pair, Certificate]:
        """The sums by pair, of the MAX_PAIRS pairs with the most tokens."""
        found = dict(self._rest)
        for pair, account in self._all():
            found[pair] = found.get(pair, Certificate()) + account.total()
        first = sorted(found, key=lambda pair: (-found[pair].tokens, pair))[:MAX_PAIRS]
        return {pair: found[pair].tidy() for pair in first if found[pair].tokens > 0.0}

    def _all(self) -> Iterator[tuple[Pair, Account]]:
        # Sorted, because float sums depend on their order and the result must not depend on the order of arrival.
        for _, accounts in sorted(self._accounts.items()):
            yield from accounts.items()

    def message(self) -> Evidence | None:
        """The sums as they travel; None without any."""
        totals = self.totals()
        if self.began_ms is None or not totals:
            return None
        return Evidence(self.began_ms, {pair: known.to_bytes() for pair, known in totals.items()})

    def snapshot(self) -> SavedEvidence:
        """Everything but the witness, for `restore`."""
        accounts = {
            name: {pair: SavedAccount(a.began_ms, a.claim.to_bytes(), a.total().to_bytes()) for pair, a in mine.items()}
            for name, mine in self._accounts.items()
        }
        rest = {pair: known.to_bytes() for pair, known in self._rest.items()}
        return SavedEvidence(self.began_ms, accounts, rest, self._joined, self._inherited)

    def restore(self, saved: SavedEvidence) -> None:
        """Replace everything by a snapshot. The witness starts anew.

        Raises:
            ProtocolError: the sums are impossible. Nothing has changed then.
        """
        accounts = {
            name: {pair: _account(kept) for pair, kept in mine.items()} for name, mine in saved.accounts.items()
        }
        rest = {pair: Certificate.from_bytes(data, part=True) for pair, data in saved.rest.items()}
        self._accounts, self._rest = accounts, rest
        self.began_ms, self._joined, self._inherited = saved.began_ms, saved.joined, saved.inherited


def certificates_of(evidence: Evidence | None) -> Mapping[Pair, Certificate]:
    """The certificates in a message, by pair.

    Raises:
        ProtocolError: the sums are impossible.
    """
    sums = {} if evidence is None else evidence.sums
    return {pair: Certificate.from_bytes(data) for pair, data in sums.items()}


def fleet_of(evidence: Evidence | None, large: str) -> Certificate | None:
    """The certificate of all pairs with an LLM, named by its half of their names; None without evidence.

    Raises:
        ProtocolError: the sums are impossible.
    """
    found = [known for pair, known in certificates_of(evidence).items() if large_of(pair) == large]
    return sum(found, Certificate()) if found else None


def count_fleet(counters: Counters, evidence: Evidence | None, large: str, confidence: float) -> None:
    """Export the fleet's certificate for the present LLM, if there is one."""
    known = fleet_of(evidence, large)
    if known is not None:
        export_fleet(counters, known, confidence)


def export_fleet(counters: Counters, known: Certificate, confidence: float) -> None:
    """Export a fleet's certificate."""
    limit = known.limit(confidence)
    counters.set_all(fleet_risk=known.estimate, fleet_risk_limit=limit, fleet_risk_tokens=known.tokens)


def _base(claim: Certificate, begin: Certificate, seen: Witness | None) -> Certificate:
    """From where a claim counts: from `begin`, or from itself if it grew by more than was seen."""
    if seen is None:
        return begin
    return claim if claim.tokens - begin.tokens > ELSEWHERE * seen.tokens + ELSEWHERE_TOKENS else begin


def _account(kept: SavedAccount) -> Account:
    claim = Certificate.from_bytes(kept.claim)
    return Account(kept.began_ms, claim, claim, held=Certificate.from_bytes(kept.total, part=True))
