"""What a model writes alone ends at the end of text, at the limit, or where its context is full."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fedhlm.decoding.alone import Alone, write
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import Decoder, DecoderInput
from fedhlm.protocol.messages import Sampling
from fedhlm_zoo.shipped import model_folder


def successor(ids: list[int]) -> NDArray[np.float64]:
    """A model that counts."""
    row: NDArray[np.float64] = np.eye(64)[ids[-1] + 1]
    return row


GREEDY = Sampling(1, 0.0, 1.0, "greedy")


def test_it_ends_with_the_end_of_text() -> None:
    assert write(successor, [3], GREEDY, 20, eos_ids={7}, context_max=60) == [4, 5, 6, 7]


def test_it_ends_at_its_limit() -> None:
    assert write(successor, [3], GREEDY, 2, eos_ids={7}, context_max=60) == [4, 5]


@pytest.mark.parametrize(("prompt", "text"), [([1, 2, 3], [4, 5]), ([1, 2, 3, 4, 5], []), (list(range(6)), [])])
def test_it_ends_where_the_context_is_full(prompt: list[int], text: list[int]) -> None:
    assert write(successor, prompt, GREEDY, 20, eos_ids=(), context_max=5) == text


def test_a_model_folder_writes_as_its_logits_of_one_call_say() -> None:
    decoder = Decoder.load(model_folder("", "llm"))
    alone, sampling = Alone(decoder), Sampling(5, 0.8)
    prompt = alone.encode("A storm at sea")
    text = alone.write(prompt, sampling, 12)
    (result,) = decoder.forward([DecoderInput(decoder.empty_cache(), prompt + text)])
    settle = COUPLINGS[sampling.coupling].settle
    rows = result.logits[len(prompt) - 1 : -1]
    assert text == [settle(row, sampling, len(prompt) + i, None, b"") for i, row in enumerate(rows)]
    assert alone.decode(text)


def test_a_full_context_ends_the_text_of_a_model_folder() -> None:
    alone = Alone.load(model_folder("", "slm"), threads=1)
    room = 3
    prompt = [5] * (alone.decoder.info.context - room)
    assert len(alone.write(prompt, Sampling(1, 0.8), 99)) <= room
