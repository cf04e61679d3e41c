"""The identity that an agent and a cloud must share before a verdict means anything.

Tokenizer, vocabulary and noise have to be equal: with any of them different, the same ids or the same seed stand for
something else on the other side. The model travels for information; the two sides run different ones by design.
"""

from typing import Final

import msgspec

from fedhlm.errors import FingerprintMismatch, ModelError
from fedhlm.protocol.messages import Fingerprint

SHARED_FIELDS: Final = ("tokenizer", "vocab_size", "noise")


def fingerprint_of(tokenizer_digest: str, vocab_size: int, *, noise: str, model: str) -> Fingerprint:
    """The fingerprint of one party; `model` is cut to what a message may carry.

    Raises:
        ModelError: a field is outside what a message may carry.
    """
    try:
        return msgspec.convert((tokenizer_digest, vocab_size, noise, model[:128]), Fingerprint)
    except msgspec.ValidationError as exc:
        raise ModelError(
            f"fingerprint of model {model!r} (tokenizer {tokenizer_digest!r}, vocab_size {vocab_size!r}, noise {noise!r})"
            f" cannot travel: {exc}"
        ) from exc


def check_agreement(ours: Fingerprint, theirs: Fingerprint) -> None:
    """Compare all that both ends must share.

    Raises:
        FingerprintMismatch: the first field that differs, with both values.
    """
    for field in SHARED_FIELDS:
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            raise FingerprintMismatch(field, mine, other)
