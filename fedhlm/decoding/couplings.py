"""Couplings: rules by which a draft is accepted or rejected, so that the output follows the target law.

docs/algorithms.md, section 2, describes them. A coupling is a row of functions in the table COUPLINGS. `split_laws`
checks the draft laws that arrive before `settle` reads them.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from fedhlm.decoding.laws import (
    check_lattice,
    coded_bytes,
    decode_full,
    decode_lattice,
    decode_top_k,
    encode_full,
    encode_lattice,
    encode_top_k,
    online_k,
    quantise,
    top_k_size,
)
from fedhlm.decoding.sampling import (
    ACCEPT_STREAM,
    DRAFT_STREAM,
    RESAMPLE_STREAM,
    Law,
    Logits,
    inverse_cdf,
    law,
    perturbed_argmax,
    probability,
    scores,
    uniform,
)
from fedhlm.decoding.uncertainty import closed_form
from fedhlm.errors import ProtocolError
from fedhlm.protocol.messages import Sampling

LATTICE_K: Final = 30
LATTICE_RESOLUTION: Final = 100
PUBLISHED_K: Final = 30  # k* of CU-HLM's offline truncation


class Draft(NamedTuple):
    """A draft, its probability under the law that it was drawn from, and the encoded law if the coupling sends it."""

    token: int
    prob: float
    law: bytes


class Coupling(NamedTuple):
    """How a draft and the target's token are drawn together.

    `draft(logits, sampling, position)` runs on the device. `settle(logits, sampling, position, draft, law)` runs in the
    cloud and returns the emitted token: the draft is accepted iff it is that token. With draft None, which is a
    position without a draft, it returns the target's own token. Logits have shape (V,).

    `law_size(laws, vocab_size)` returns the bytes of the first law in a buffer of laws. `check(law, vocab_size)` checks
    one law of that size. Both raise ProtocolError where `settle` could not use the law.

    `harm(draft_prob, target_prob, missed)` is the harm in [0, 1] of committing the draft without verification. `missed`
    says that the target would have emitted another token with this seed. Where a rejected draft is resampled from the
    residual, TV(out, p) of one step equals E[(1 - g) beta], where g is the probability of verification. Under shared
    noise TV(out, p) is at most the probability of a kept mismatch, so the harm is the mismatch (docs/algorithms.md, 3).

    `shared` says that the emitted token depends on seed and target only, so that any proposal may replace the draft.
    `greedy` says that it is the target's likeliest token, whatever the seed. `alone` is the coupling under which the
    oracle writes the texts that this coupling's texts are compared with.
    """

    draft: Callable[[Logits, Sampling, int], Draft]
    settle: Callable[[Logits, Sampling, int, int | None, bytes], int]
    law_size: Callable[[bytes | memoryview, int], int]
    check: Callable[[bytes, int], object]
    harm: Callable[[float, float, bool], float]
    shared: bool
    greedy: bool = False
    alone: str = "gumbel"


def split_laws(coupling: Coupling, laws: bytes, count: int, vocab_size: int) -> list[bytes]:
    """Split a buffer of `count` concatenated laws and check each of them.

    Raises:
        ProtocolError: the length does not fit `count` laws, or one of them is not valid.
    """
    rest = memoryview(laws)  # slices without copying, as a block may hold thousands of laws
    parts: list[bytes] = []
    for _ in range(count):
        try:
            size = coupling.law_size(rest, vocab_size)
            if size > len(rest):
                raise ProtocolError(f"draft law must be {size} bytes (got {len(rest)})")
            coupling.check(part := bytes(rest[:size]), vocab_size)
        except ProtocolError as exc:
            raise ProtocolError(
                f"escalation.laws must be one law for each of {count} drafts "
                f"(got {len(laws)} bytes; draft {len(parts)}: {exc})"
            ) from exc
        parts.append(part)
        rest = rest[size:]
    if rest:
        raise ProtocolError(
            f"escalation.laws must be {len(laws) - len(rest)} bytes for {count} drafts (got {len(laws)})"
        )
    return parts


def rejection_probability(draft_prob: float, target_prob: float) -> float:
    """beta = max(0, 1 - p(d)/q(d)), FedHLM eq. (3); 0 where q(d) is 0."""
    return max(0.0, 1.0 - target_prob / draft_prob) if draft_prob > 0.0 else 0.0


def acceptance(draft_prob: float, target_prob: float) -> float:
    """The probability of acceptance, min(1, p(d)/q(d)); where q(d) is 0, it is 1 iff p(d) is above 0."""
    return min(1.0, target_prob / draft_prob) if draft_prob > 0.0 else float(target_prob > 0.0)


def residual(p: Law, q: Law) -> Law:
    """max(0, p - q), from which a rejected draft is resampled; not normalised; shape (V,), all 0 where p equals q."""
    return np.maximum(0.0, p - q)


def _accept_or_resample(p: Law, q: Law, sampling: Sampling, position: int, draft: int) -> int:
    """Accept the draft or resample it from the residual. The result follows p if the draft was drawn from q."""
    if uniform(sampling.seed, position, ACCEPT_STREAM) < acceptance(float(q[draft]), float(p[draft])):
        return draft
    rest = residual(p, q)
    if rest.sum() <= 0.0:
        return draft  # p equals q up to rounding, so the residual is empty
    return inverse_cdf(rest, uniform(sampling.seed, position, RESAMPLE_STREAM))


def _settle_by(decode: Callable[[bytes, int], Law]) -> Callable[[Logits, Sampling, int, int | None, bytes], int]:
    """Make a `settle` that accepts or rejects the draft by the law that `decode` reads."""

    def settle(logits: Logits, sampling: Sampling, position: int, draft: int | None, encoded: bytes) -> int:
        p = law(logits, sampling)
        if draft is None:
            return inverse_cdf(p, uniform(sampling.seed, position, RESAMPLE_STREAM))
        return _accept_or_resample(p, decode(encoded, len(logits)), sampling, position, draft)

    return settle


def _draft_from(q: Law, encoded: bytes, sampling: Sampling, position: int) -> Draft:
    token = inverse_cdf(q, uniform(sampling.seed, position, DRAFT_STREAM))
    return Draft(token, float(q[token]), encoded)


def _draft_gumbel(logits: Logits, sampling: Sampling, position: int) -> Draft:
    log_law = scores(logits, sampling)
    token = perturbed_argmax(log_law, sampling.seed, position)
    return Draft(token, probability(log_law, token), b"")


def _settle_gumbel(logits: Logits, sampling: Sampling, position: int, _draft: int | None, _law: bytes) -> int:
    return perturbed_argmax(scores(logits, sampling), sampling.seed, position)


def _draft_greedy(logits: Logits, sampling: Sampling, _position: int) -> Draft:
    token = int(np.argmax(logits))
    # The proposal is a point mass, but beta of [3] is defined with the softmax probability.
    return Draft(token, probability(scores(logits, sampling), token), b"")


def _settle_greedy(logits: Logits, _sampling: Sampling, _position: int, _draft: int | None, _law: bytes) -> int:
    return int(np.argmax(logits))


def _draft_full(logits: Logits, sampling: Sampling, position: int) -> Draft:
    encoded = encode_full(law(logits, sampling))
    # The draft is drawn from the law that is sent, after rounding. This keeps HLM exact.
    return _draft_from(decode_full(encoded, len(logits)), encoded, sampling, position)


def _draft_lattice(logits: Logits, sampling: Sampling, position: int) -> Draft:
    point = quantise(law(logits, sampling), LATTICE_K, LATTICE_RESOLUTION)
    # The quantile of the tokens of the lattice is that of the whole law: the others are 0 in its sums.
    place, prob, encoded = _draft_from(point.shares, encode_lattice(point, len(logits)), sampling, position)
    return Draft(int(point.support[place]), prob, encoded)


def _decode_lattice(data: bytes, vocab_size: int) -> Law:
    return decode_lattice(data, vocab_size, LATTICE_K, LATTICE_RESOLUTION).dense(vocab_size)


Truncation = Callable[[Law, Logits, int, float], int]
"""Returns k from the law in falling order, shape (V,), the logits, shape (V,), the draft and its probability."""


def _offline(ordered: Law, _logits: Logits, _token: int, _prob: float) -> int:
    return min(PUBLISHED_K, ordered.size)


def _online(ordered: Law, logits: Logits, token: int, prob: float) -> int:
    return online_k(ordered, draft_prob=prob, uncertainty=closed_form(logits, token))


def _draft_published(k_of: Truncation) -> Callable[[Logits, Sampling, int], Draft]:
    """CU-HLM as published: the draft is drawn from q, but accepted by x-hat, which the server rebuilds from q's top k.

    The output is therefore biased, by TV(out, p) <= TV(q, x-hat): acceptance and resampling map x-hat to p, and no map
    widens the distance of two laws. Drawing from x-hat would be exact. The published form is kept for comparison.
    """

    def draft(logits: Logits, sampling: Sampling, position: int) -> Draft:
        q = law(logits, sampling)
        token, prob, _ = _draft_from(q, b"", sampling, position)
        order = np.argsort(-q, kind="stable")  # (V,) int64
        k = k_of(q[order], logits, token, prob)
        return Draft(token, prob, encode_top_k(q, order[:k]))

    return draft


def _nothing(_laws: bytes | memoryview, _vocab_size: int) -> int:
    return 0


def _mismatch(_draft_prob: float, _target_prob: float, missed: bool) -> float:
    return float(missed)


def _beta(draft_prob: float, target_prob: float, _missed: bool) -> float:
    return rejection_probability(draft_prob, target_prob)


def _published(k_of: Truncation) -> Coupling:
    return Coupling(
        draft=_draft_published(k_of),
        settle=_settle_by(decode_top_k),
        law_size=top_k_size,
        check=decode_top_k,
        harm=_beta,
        shared=False,
    )


COUPLINGS: Final[dict[str, Coupling]] = {
    "gumbel": Coupling(
        draft=_draft_gumbel, settle=_settle_gumbel, law_size=_nothing, check=_nothing, harm=_mismatch, shared=True
    ),
    "greedy": Coupling(
        draft=_draft_greedy,
        settle=_settle_greedy,
        law_size=_nothing,
        check=_nothing,
        harm=_mismatch,
        shared=True,
        greedy=True,
        alone="greedy",
    ),
    "full": Coupling(
        draft=_draft_full,
        settle=_settle_by(decode_full),
        law_size=lambda _laws, vocab_size: 2 * vocab_size,
        check=decode_full,
        harm=_beta,
        shared=False,
    ),
    "lattice": Coupling(
        draft=_draft_lattice,
        settle=_settle_by(_decode_lattice),
        law_size=lambda _laws, vocab_size: coded_bytes(vocab_size, LATTICE_K, LATTICE_RESOLUTION),
        check=lambda data, vocab_size: check_lattice(data, vocab_size, LATTICE_K, LATTICE_RESOLUTION),
        harm=_beta,
        shared=False,
    ),
    "published-cu": _published(_offline),
    "published-cu-online": _published(_online),
}
