"""Checks a contribution against the verdicts that passed the edge; no I/O.

Every verdict passes an edge. It therefore knows how many tokens the target scored for an agent, and for how many of
them the target would have emitted another token. Larger sums are cut, and missing harm is added.
"""

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

import numpy as np

from fedhlm.learning.certificate import AUDIT_CHANCES, audit_probability
from fedhlm.learning.curve import Curve
from fedhlm.learning.evidence import Witness
from fedhlm.protocol.fields import MAX_PAIRS, Pair
from fedhlm.protocol.fingerprint import pair_in
from fedhlm.protocol.messages import PaperThreshold, Verdict

AGENTS_MAX: Final = 4_096
SLACK_TOKENS: Final = 256.0  # tokens that may have passed while this edge, or its disk, was absent
SLACK_SHARE: Final = 0.25  # the same, as a share of what the agent had before
HARM_SHARE: Final = 0.5  # the share of passed harm that must be claimed: agents do not learn from late verdicts
HARM_ERRORS: Final = (
    3.0  # standard errors: under couplings with a residual, harm is an expectation and what passed is a draw
)


class Sums(NamedTuple):
    """The number of scored tokens, and the number of wrong ones among them."""

    tokens: float = 0.0
    harm: float = 0.0


class Claim(NamedTuple):
    """A contribution's thresholds and curves after the check. `cut` lists in words what was changed."""

    thresholds: Mapping[Pair, PaperThreshold]
    curves: Mapping[str, Curve]
    cut: tuple[str, ...]


class _Account:
    def __init__(self) -> None:
        self.passed = Sums()
        self.witness = Witness()
        self.before: Sums | None = None  # the agent's sums when this edge first heard of it; None: not yet heard
        self.counted = 0.0  # tokens that had passed at its latest contribution


class SettledTokens:
    """Accounts of at most AGENTS_MAX agents, one for each pair of their SLM and the LLM that scored their tokens.

    The agent that has been silent for longest is dropped first. What an agent brings along counts at its first
    contribution only. Of a pair that it names later, only tokens that pass from then on count.

    A measure whose name begins with one of `uncertainties` is about an agent's own drafts. Harm is checked for these
    only.
    """

    def __init__(self, uncertainties: Collection[str]) -> None:
        self._uncertainties = frozenset(uncertainties)
        self._accounts: OrderedDict[str, OrderedDict[str, _Account]] = OrderedDict()
        self._begun: OrderedDict[str, None] = OrderedDict()

    def note(self, agent: str, verdict: Verdict, pair: Pair = "", *, added: int = 0, audit: bool = False) -> None:
        """Count a verdict that passes to an agent, on tokens of `pair`.

        `added` is the number of its ids. An `audit` is the verdict on a tail.
        """
        scored = len(verdict.target_probs) // 2
        if verdict.status != "settled" or not scored:
            return
        account = self._account(agent, pair)
        missed = int.from_bytes(verdict.missed, "little").bit_count()
        wrong = min(scored, missed + (scored > verdict.accepted))
        account.passed = Sums(account.passed.tokens + scored, account.passed.harm + wrong)
        seen, tokens = account.witness, verdict.accepted + added
        if audit:
            account.witness = seen._replace(
                audited=seen.audited + tokens,
                audited_wrong=seen.audited_wrong + missed,
                tails=seen.tails + tokens / audit_probability(AUDIT_CHANCES[0], tokens),
            )
        else:
            account.witness = seen._replace(settled=seen.settled + tokens, wrong=seen.wrong + missed)

    def witness(self, agent: str, pair: Pair) -> Witness:
        """What passed to an agent under a pair."""
        accounts = self._accounts.get(agent)
        account = None if accounts is None else accounts.get(_named(pair))
        return Witness() if account is None else account.witness

    def forget(self, agent: str) -> None:
        """Close an agent's accounts: it has moved, or its name belongs to another agent."""
        self._accounts.pop(agent, None)

    def begin(self, agent: str) -> None:
        """Open new accounts: of what the agent claims, only tokens that pass from now on count."""
        self._accounts.pop(agent, None)
        self._begun[agent] = None
        while len(self._begun) > AGENTS_MAX:
            self._begun.popitem(last=False)

    def check(
        self,
        agent: str,
        thresholds: Mapping[Pair, PaperThreshold],
        curves: Mapping[str, Curve],
        known: Mapping[str, Curve] | None = None,
    ) -> Claim:
        """Cut an agent's contribution to what is possible. `known` holds its curves from before this edge's life."""
        cut: list[str] = []
        possible: dict[str, Curve] = {}
        counted: dict[Pair, PaperThreshold] = {}
        begun = agent in self._begun or any(a.before is not None for a in self._accounts.get(agent, {}).values())
        for pair in sorted({*map(pair_in, curves), *map(_named, thresholds)}):
            claim = self._checked(
                self._account(agent, pair),
                {name: threshold for name, threshold in thresholds.items() if _named(name) == pair},
                {name: curve for name, curve in curves.items() if pair_in(name) == pair},
                {name: curve for name, curve in (known or {}).items() if pair_in(name) == pair},
                begun=begun,
            )
            possible |= claim.curves
            counted |= claim.thresholds
            cut += claim.cut
        return Claim(counted, possible, tuple(dict.fromkeys(cut)))

    def _checked(
        self,
        account: _Account,
        thresholds: Mapping[Pair, PaperThreshold],
        curves: Mapping[str, Curve],
        known: Mapping[str, Curve],
        *,
        begun: bool,
    ) -> Claim:
        if account.before is None:
            claimed = Sums() if begun else _history(self.sums(curves), account.passed)
            account.before = self.sums(known) if known else claimed
        cut: list[str] = []
        most = account.before.tokens * (1.0 + SLACK_SHARE) + account.passed.tokens + SLACK_TOKENS
        possible = dict(self._limited(curves, most, cut))
        drafts = {name: curve for name, curve in possible.items() if self._of_drafts(name)}
        missing = self._missing(account, self.sums(drafts))
        if missing > 0.0:
            cut.append(f"lacks the harm of {missing:.0f} tokens")
            possible |= _with_harm(drafts, missing)
        counted = dict(thresholds)
        sent = account.passed.tokens - account.counted + SLACK_TOKENS
        for pair, threshold in thresholds.items():
            if threshold.count > sent:
                cut.append(f"counts {threshold.count} tokens for its threshold, {sent:.0f} at most were scored")
                counted[pair] = PaperThreshold(threshold.threshold, int(sent), threshold.control, threshold.steps)
        account.counted = account.passed.tokens
        return Claim(counted, possible, tuple(cut))

    def _missing(self, account: _Account, claimed: Sums) -> float:
        before, passed = account.before or Sums(), account.passed
        fresh = min(passed.tokens, claimed.tokens - before.tokens)
        if fresh <= 0.0:
            return 0.0
        wrong = passed.harm * fresh / passed.tokens
        least = HARM_SHARE * wrong - HARM_ERRORS * math.sqrt(wrong)
        return least - (claimed.harm - before.harm)

    def _account(self, agent: str, pair: Pair) -> _Account:
        accounts = self._accounts.setdefault(agent, OrderedDict())
        account = accounts.setdefault(_named(pair), _Account())
        self._accounts.move_to_end(agent)
        accounts.move_to_end(_named(pair))
        while len(self._accounts) > AGENTS_MAX:
            self._accounts.popitem(last=False)
        while len(accounts) > MAX_PAIRS:
            accounts.popitem(last=False)
        return account

    def sums(self, curves: Mapping[str, Curve]) -> Sums:
        """Sum up the curves about drafts; where there is none, take the largest curve."""
        drafts = [curve for name, curve in curves.items() if self._of_drafts(name)]
        if drafts:
            return Sums(sum(c.total_weight for c in drafts), sum(float(c.harm.sum()) for c in drafts))
        return max((Sums(c.total_weight, float(c.harm.sum())) for c in curves.values()), default=Sums())

    def _of_drafts(self, measure: str) -> bool:
        return measure.partition("/")[0] in self._uncertainties

    def _limited(self, curves: Mapping[str, Curve], most: float, cut: list[str]) -> Mapping[str, Curve]:
        drafts = sum(curve.total_weight for name, curve in curves.items() if self._of_drafts(name))
        limited = {}
        for name, curve in curves.items():
            tokens = drafts if self._of_drafts(name) else curve.total_weight
            if tokens > most:
                cut.append(f"claims {tokens:.0f} tokens, {most:.0f} at most were scored")
            limited[name] = curve.scaled(most / tokens) if tokens > most else curve
        return limited


def _named(pair: Pair) -> Pair:
    """The pair whose account this is; empty for what names no two models, as `pair_in` says it of a measure."""
    return pair_in(pair)


def _history(claimed: Sums, passed: Sums) -> Sums:
    """The earlier sums of an agent that is new to this edge, taking its claim as true."""
    if claimed.tokens <= passed.tokens + SLACK_TOKENS:
        return Sums()
    return Sums(claimed.tokens - passed.tokens, max(0.0, claimed.harm - passed.harm))


def _with_harm(curves: Mapping[str, Curve], missing: float) -> dict[str, Curve]:
    """Add `missing` harm to the curves, spread over the tokens without harm."""
    room = sum(curve.total_weight - float(curve.harm.sum()) for curve in curves.values())
    share = min(1.0, missing / room) if room > 0.0 else 0.0
    made = {}
    for name, curve in curves.items():
        harm = curve.harm + share * (curve.weight - curve.harm)
        made[name] = Curve(curve.seen, curve.weight, harm, np.minimum(harm, curve.square + share * curve.weight))
    return made
