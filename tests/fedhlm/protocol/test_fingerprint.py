"""Properties of the shared identity: what must be equal, what may differ, what can travel."""

import msgspec
import pytest

from fedhlm.errors import FingerprintMismatch, ModelError
from fedhlm.protocol.fingerprint import check_agreement, fingerprint_of
from fedhlm.protocol.messages import Fingerprint

OURS = fingerprint_of("ab12", 4096, noise="threefry-1", model="slm")


def test_different_models_agree() -> None:
    check_agreement(OURS, fingerprint_of("ab12", 4096, noise="threefry-1", model="llm"))


@pytest.mark.parametrize(
    ("field", "theirs"),
    [("tokenizer", "ff00"), ("vocab_size", 4097), ("noise", "threefry-2")],
)
def test_a_difference_names_the_field_and_both_values(field: str, theirs: object) -> None:
    other = msgspec.structs.replace(OURS, **{field: theirs})
    with pytest.raises(FingerprintMismatch) as caught:
        check_agreement(OURS, other)
    assert (caught.value.field, caught.value.ours, caught.value.theirs) == (field, getattr(OURS, field), theirs)


def test_a_fingerprint_survives_the_wire() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(OURS), type=Fingerprint) == OURS


def test_a_long_model_name_is_cut_to_what_a_message_carries() -> None:
    long = fingerprint_of("ab12", 4096, noise="threefry-1", model="m" * 500)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(long), type=Fingerprint) == long


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "noise"),
    [("a" * 65, 4096, "n"), ("a", 1, "n"), ("a", 2**24, "n"), ("a", 4096, "n" * 33)],
)
def test_what_cannot_travel_is_refused_at_the_source(tokenizer: str, vocab_size: int, noise: str) -> None:
    with pytest.raises(ModelError, match="cannot travel"):
        fingerprint_of(tokenizer, vocab_size, noise=noise, model="m")
