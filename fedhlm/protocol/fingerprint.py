"""The fingerprint that an agent and a cloud compare before they work together.

Tokenizer, vocabulary and noise must be equal. Otherwise the same id or the same seed means something else on the other
side. The model name may differ: the two sides run different models by design. Both fingerprints together name the pair
of models that learnt curves, thresholds and certificates are about.
"""

import hashlib
from typing import Final

import msgspec

from fedhlm.errors import FingerprintMismatch, ModelError
from fedhlm.protocol.fields import Measure, Pair
from fedhlm.protocol.messages import Fingerprint

SHARED_FIELDS: Final = ("tokenizer", "vocab_size", "noise")
_DIGITS: Final = 6  # of each half of a pair: 24 bits


def fingerprint_of(tokenizer_digest: str, vocab_size: int, *, noise: str, model: str) -> Fingerprint:
    """Make the fingerprint of one party. `model` is cut to the 128 characters that a message may carry.

    Raises:
        ModelError: another field is outside the limits of a message.
    """
    try:
        return msgspec.convert((tokenizer_digest, vocab_size, noise, model[:128]), Fingerprint)
    except msgspec.ValidationError as exc:
        raise ModelError(
            f"fingerprint of model {model!r} (tokenizer {tokenizer_digest!r}, vocab_size {vocab_size!r}, "
            f"noise {noise!r}) cannot travel: {exc}"
        ) from exc


def check_agreement(ours: Fingerprint, theirs: Fingerprint) -> None:
    """Compare the fields that both ends must share.

    Raises:
        FingerprintMismatch: a field differs; the error names the first one, with both values.
    """
    for field in SHARED_FIELDS:
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            raise FingerprintMismatch(field, mine, other)


def pair_of(small: Fingerprint, large: Fingerprint | None, *, otherwise: str = "") -> Pair:
    """Name the pair of an SLM and an LLM by short digests of their fingerprints, such as "3fa4b1.09c2de".

    `otherwise` stands for the LLM's half while no cloud is known.
    """
    return f"{half_of(small)}.{otherwise if large is None else half_of(large)}"


def half_of(model: Fingerprint | None) -> str:
    """The digest of a model in the name of its pairs; empty for None."""
    return "" if model is None else hashlib.sha256(msgspec.msgpack.encode(model)).hexdigest()[:_DIGITS]


def large_of(pair: Pair) -> str:
    """The digest of the LLM in the name of a pair; empty if it is not known."""
    return pair.partition(".")[2]


def pair_in(measure: Measure) -> Pair:
    """The pair at the end of a measure's name; empty if there is none."""
    last = measure.rpartition("/")[2]
    return last if "." in last else ""
