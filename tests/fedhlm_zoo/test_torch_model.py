"""Models that torch runs: the same logits, hidden states and ids as their ONNX export, however ids are cut and batched."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cloud_verifier.__main__ import opened
from cloud_verifier.engine import EngineInput, EngineOutput
from fedhlm.decoding.alone import Alone
from fedhlm.decoding.decoder import Decoder, DecoderInput
from fedhlm.decoding.invariance import block_difference
from fedhlm.decoding.models import LoadedModel, backend_of, load_model
from fedhlm.errors import ModelError
from fedhlm.protocol.fingerprint import check_agreement
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Cloud
from tests.fedhlm.decoding.conformance import Conformance

torch = pytest.importorskip("torch", reason="runs its models with torch")
pytestmark = pytest.mark.torch

CLOSE = 1e-3
Exported = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def model(exported: Exported) -> LoadedModel:
    source = exported("llama")[0]
    assert backend_of(str(source)) == "transformers"
    return load_model(source)


class TestTransformers(Conformance):
    """A tiny Llama, opened by its folder."""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_a_model_of_torch_computes_what_its_export_computes(kind: str, exported: Exported) -> None:
    from fedhlm_zoo.torch_model import TorchDecoder

    source, folder = exported(kind)
    ours, other = TorchDecoder.load(source), Decoder.load(folder)
    assert ours.vocabulary == other.vocabulary
    for field in ("context", "layers", "kv_heads", "head_dim", "hidden_size", "eos_ids", "bos_id", "parameters"):
        assert getattr(ours.info, field) == getattr(other.info, field), field
    assert ours.token_bytes == other.token_bytes
    assert block_difference(ours) < CLOSE
    ids = np.random.default_rng(1).integers(0, ours.vocabulary.size, 40).tolist()
    mine = ours.forward([DecoderInput(ours.empty_cache(), ids)])[0]
    theirs = other.forward([DecoderInput(other.empty_cache(), ids)])[0]
    assert np.abs(mine.logits - theirs.logits).max() < CLOSE
    assert theirs.hidden is not None
    assert mine.hidden is not None
    assert np.abs(mine.hidden - theirs.hidden).max() < CLOSE
    for sampling in (Sampling(3, 0.0), Sampling(3, 0.8)):
        assert Alone(ours).write(ids, sampling, 30) == Alone(other).write(ids, sampling, 30)


def test_caches_are_values_and_batches_give_each_request_its_own(exported: Exported) -> None:
    from fedhlm_zoo.torch_model import TorchDecoder

    model = TorchDecoder.load(exported("llama")[0])
    empty = model.empty_cache()
    whole = model.forward([DecoderInput(empty, list(range(1, 31)))])[0]
    cache = whole.cache.truncated(12)
    before = [t.clone() for t in cache.tensors]
    requests = [
        DecoderInput(cache, list(range(13, 31)), 5),
        DecoderInput(empty, [1, 2], 2),
        DecoderInput(whole.cache.truncated(29), [30], 1),
        DecoderInput(cache, [7, 8, 9], 0),
    ]
    outputs = model.forward(requests)
    for output, rows in ((outputs[0], slice(25, 30)), (outputs[1], slice(0, 2)), (outputs[2], slice(29, 30))):
        assert np.abs(output.logits - whole.logits[rows]).max() < CLOSE
    assert outputs[3].logits.shape == (0, model.vocabulary.size)
    assert [output.cache.length for output in outputs] == [30, 2, 30, 15]
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors, strict=True))
    follow = model.forward([DecoderInput(output.cache, [3], 1) for output in outputs])
    assert np.abs(follow[0].logits - follow[2].logits).max() < CLOSE
    with pytest.raises(ValueError, match="cannot be cut to 31"):
        whole.cache.truncated(31)
    for wrong in ([], [model.vocabulary.size], [1] * 97):
        with pytest.raises(ValueError, match="ids"):
            model.forward([DecoderInput(empty, wrong)])


def test_bfloat16_is_half_as_large_and_not_invariant_and_a_missing_device_is_told(exported: Exported) -> None:
    from fedhlm_zoo.torch_model import CUDA, TorchDecoder

    source = exported("llama")[0]
    half, whole = load_model(source, dtype="bfloat16"), TorchDecoder.load(source)
    assert half.token_bytes * 2 == whole.token_bytes
    assert half.info.quantisation == "bf16"
    ids = list(range(1, 20))
    near = half.forward([DecoderInput(half.empty_cache(), ids)])[0].logits
    exact = whole.forward([DecoderInput(whole.empty_cache(), ids)])[0].logits
    assert near.dtype == np.float32
    assert 0.0 < np.abs(near - exact).max() < 0.5
    with pytest.raises(ModelError, match="dtype must be one of float32, bfloat16"):
        load_model(source, dtype="int4")
    with pytest.raises(ModelError, match="dtype must be left out for a model that onnx runs"):
        load_model(exported("llama")[1], dtype="float32")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            TorchDecoder.load(source, providers=(CUDA,))


async def test_a_cloud_opens_a_hub_folder_and_says_what_bfloat16_costs(
    exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    source, folder = exported("llama")
    ids = list(range(1, 30))
    async with opened(Cloud(model=str(source))) as (large, offer), opened(Cloud(model=str(folder))) as (other, _):
        assert (offer.architecture, offer.quantisation) == ("LlamaForCausalLM", "fp32")
        check_agreement(large.fingerprint, other.fingerprint)
        assert large.fingerprint.model != other.fingerprint.model
        assert (large.context, large.eos_ids) == (other.context, other.eos_ids)
        ours, theirs = [
            (await model.engine.forward([EngineInput(model.engine.empty_cache, ids, 4)]))[0] for model in (large, other)
        ]
        assert isinstance(ours, EngineOutput)
        assert isinstance(theirs, EngineOutput)
        assert np.abs(ours.logits - theirs.logits).max() < CLOSE
        assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        async with opened(Cloud(model=str(source), dtype="bfloat16")):
            assert "set cloud.dtype to float32" in caplog.text
