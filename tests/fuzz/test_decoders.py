"""Every decoder takes or refuses whatever it is given; nothing else escapes from it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import mutators
from tests.fuzz.target import Target, input_of
from tests.fuzz.targets import DECODERS

EXAMPLES = 120


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_takes_or_refuses_whatever_comes(name: str) -> None:
    target = DECODERS[name]

    @settings(max_examples=EXAMPLES if target.share >= 0.5 else EXAMPLES // 4)
    @given(st.integers(0, 2**32), st.binary(max_size=64))
    def check(seed: int, data: bytes) -> None:
        target.run(input_of(target, random.Random(seed)))
        target.run(data)

    check()


# The seeds of the others are of all sizes, random within their types, or words of which some are meant to be refused.
@pytest.mark.parametrize(
    "name", sorted(DECODERS.keys() - {"message", "ids", "learned", "config", "url", "preset", "flags"})
)
def test_inputs_that_were_not_spoilt_are_taken(name: str) -> None:
    rng = random.Random(1)
    assert all(DECODERS[name].run(DECODERS[name].seed(rng)) for _ in range(10))


def _taken(target: Target, rounds: int) -> int:
    rng = random.Random(3)
    return sum(target.run(input_of(target, rng)) for _ in range(rounds))


@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {"config", "mosquitto", "preset", "preset-file", "state"}))
def test_spoilt_inputs_reach_both_outcomes(name: str) -> None:
    """A harness whose inputs were all refused at the first byte would find nothing."""
    taken = _taken(DECODERS[name], 200)
    assert 0 < taken < 200


def test_every_type_of_message_is_made_and_spoilt() -> None:
    rng = random.Random(5)
    made = {row.payload for _ in range(400) if (row := mutators.row_of(mutators.valid(rng).topic)) is not None}
    assert made == set(mutators.KINDS)
