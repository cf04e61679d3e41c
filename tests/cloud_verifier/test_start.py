"""What a cloud says about its model before it serves."""

import logging

import pytest

from cloud_verifier.__main__ import warn_of_blocks
from fedhlm.decoding.decoder import Decoder
from fedhlm_zoo.shipped import model_folder


def said_of(model: str, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_blocks(Decoder.load(model_folder("", "slm" if model == "slm" else "llm")))
    return caplog.text


def test_a_model_whose_texts_depend_on_the_size_of_blocks_is_named_before_it_serves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert "int8-dynamic" in said_of("slm", caplog)
    assert "weights-int8" in caplog.text
    assert said_of("llm", caplog) == ""
