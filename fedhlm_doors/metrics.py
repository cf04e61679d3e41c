"""The figures and origins that answers carry besides their text. No I/O.

`metrics.speculative_decoding` has the names that vLLM gives, and `metrics.fedhlm` holds what only we have.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from fedhlm.answering import Slice, TokenOrigin
from fedhlm.protocol.sources import SOURCES

RISK: Final = "risk_"
_SUMMED: Final = (
    "uplink_bytes",
    "uplink_messages",
    "cluster_bytes",
    "round_trips",
    "rollbacks",
    "discarded",
    "escalated",
)
_NEWEST: Final = {"risk": "r_hat", "risk_limit": "r_hat_limit", "tau": "tau"}


def origin(token: TokenOrigin) -> dict[str, Any]:
    """Who decided one token."""
    return {
        "id": token.token,
        "source": token.source,
        "verified": SOURCES[token.source].verified,
        "doubt": token.doubt,
        "draft": token.draft,
    }


def metrics(ends: Sequence[Slice], tokens: Sequence[TokenOrigin]) -> dict[str, Any]:
    """The figures of a request, from the last slices and all tokens of its choices."""
    found: dict[str, Any] = {}
    drafting = [end.drafting for end in ends if end.drafting is not None]
    if drafting:
        found["speculative_decoding"] = _speculative(
            [d.accepted for d in drafting], sum(drafted.drafts for drafted in drafting)
        )
    figures: dict[str, Any] = {"tokens": dict(Counter(token.source for token in tokens))}
    for name in _SUMMED:
        if any(name in end.statistics for end in ends):
            figures[name] = round(sum(end.statistics.get(name, 0.0) for end in ends))
    newest = ends[-1].statistics if ends else {}
    figures |= {ours: newest[name] for name, ours in _NEWEST.items() if name in newest}
    certificate = {
        name.removeprefix(RISK): value
        for name, value in newest.items()
        if name.startswith(RISK) and name not in _NEWEST
    }
    if certificate:
        figures["certificate"] = certificate
    return found | {"fedhlm": figures}


def _speculative(histograms: Sequence[tuple[int, ...]], drafts: int) -> dict[str, Any]:
    longest = max(map(len, histograms), default=0)
    histogram = [sum(h[j] for h in histograms if j < len(h)) for j in range(longest)]
    steps, accepted = sum(histogram), sum(j * count for j, count in enumerate(histogram))
    return {
        "mean_acceptance_length": 1.0 + accepted / steps if steps else 0.0,
        "draft_acceptance_rate": accepted / drafts if drafts else 0.0,
        "acceptance_histogram": histogram,
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafts,
    }
