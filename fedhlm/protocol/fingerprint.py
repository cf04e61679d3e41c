"""The fingerprint that an agent and a cloud compare before they work together.

Tokenizer, vocabulary and noise must be equal. Otherwise the same id or the same seed means something else on the other
side. The model name is for information only: the two sides run different models by design.
"""

from typing import Final

import msgspec

from fedhlm.errors import FingerprintMismatch, ModelError
from fedhlm.protocol.messages import Fingerprint

SHARED_FIELDS: Final = ("tokenizer", "vocab_size", "noise")


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
