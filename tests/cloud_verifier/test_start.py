"""What a cloud says about its model before it serves."""

import logging

import pytest

from cloud_verifier.__main__ import warn_of_blocks
from cloud_verifier.backends.in_process import engine_of
from cloud_verifier.wiring import LargeModel
from fedhlm.config import load
from fedhlm.decoding.decoder import Decoder
from fedhlm.errors import ModelError
from fedhlm_zoo.shipped import model_folder, with_cloud_model


def said_of(model: str, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_blocks(Decoder.load(model_folder("", "slm" if model == "slm" else "llm")))
    return caplog.text


def test_a_draft_model_with_another_tokenizer_is_rejected_before_the_cloud_serves() -> None:
    slm, llm = (Decoder.load(model_folder("", name)) for name in ("slm", "llm"))
    large = LargeModel.of(llm, engine_of(llm))
    beside = large.beside(slm, engine_of(slm)).small
    assert beside is not None
    assert beside.context == slm.info.context
    slm.vocabulary = slm.vocabulary._replace(size=slm.vocabulary.size - 1)
    with pytest.raises(ModelError, match=r"cloud.draft_model must have the tokenizer of cloud.model, .* \(got "):
        large.beside(slm, engine_of(slm))


@pytest.mark.parametrize(
    ("given", "beside"),
    [({}, True), ({"model": "/m/large"}, False), ({"model": "/m/large", "draft_model": "/m/small"}, True)],
)
def test_the_shipped_small_model_drafts_beside_the_shipped_large_one_only(given: dict[str, str], beside: bool) -> None:
    flags = {f"cloud.{key}": value for key, value in given.items()}
    cloud = with_cloud_model(load(environ={}, flags=flags)).config.cloud
    assert bool(cloud.draft_model) == beside
    assert cloud.draft_model == given.get("draft_model", cloud.draft_model)


def test_a_model_whose_texts_depend_on_the_size_of_blocks_is_named_before_it_serves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert "int8-dynamic" in said_of("slm", caplog)
    assert "weights-int8" in caplog.text
    assert said_of("llm", caplog) == ""
