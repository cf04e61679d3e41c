"""What a cloud says about its model before it serves."""

import logging
from functools import partial

import pytest

from cloud_verifier.__main__ import warn_of_blocks
from cloud_verifier.backends.in_process import engine_of
from cloud_verifier.wiring import LargeModel
from fedhlm.config import load
from fedhlm.decoding.decoder import Decoder
from fedhlm.errors import ModelError
from fedhlm.protocol.messages import Sampling
from fedhlm.telemetry import forget_warnings
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.studies.compare import StudyTask, run_fleet
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


@pytest.mark.parametrize("beside", [True, False])
def test_a_cloud_without_a_draft_model_says_so_once_and_writes_the_same_text(
    beside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pair = toy.pair(0.8) if beside else toy.pair(0.8)._replace(beside=lambda: None)
    config = load(preset="colocated", environ={}).config
    asked = [StudyTask([5, 6], Sampling(number, 0.8), 12, "") for number in range(2)]
    forget_warnings()
    with caplog.at_level(logging.WARNING):
        done, _ = run_virtual(partial(run_fleet, pair, config, [asked, [], [], []], 0.0)())
    assert [one.result.ids for one in done] == [toy.large_alone([5, 6], one.sampling, 12) for one in asked]
    assert caplog.text.count("cloud.draft_model names no model") == (0 if beside else 1)


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
