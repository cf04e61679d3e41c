"""Export a Hugging Face causal language model to a model folder that `fedhlm.decoding.decoder` runs.

optimum exports the graph with its key/value cache; the last hidden state is added as an output. An export whose
logits differ from torch's is an error, not a warning.
"""

import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from fedhlm.decoding.decoder import (
    GRAPH_FILE,
    INFO_FILE,
    Cache,
    Decoder,
    DecoderInput,
    ModelInfo,
)
from fedhlm.decoding.hub import begin_id
from fedhlm.decoding.models import backend_of, tokenizer_at
from fedhlm.decoding.vocabulary import TOKENIZER_FILE
from fedhlm.errors import ModelError
from fedhlm.progress import progress
from fedhlm_zoo import gguf_weights, graph
from fedhlm_zoo.info import copy_chat_files, write_info

log = logging.getLogger(__name__)

TOLERANCE: Final = 1e-3
TASK: Final = "text-generation-with-past"


def export(source: str | Path, out: Path, *, tokenizer: Path | None = None, name: str | None = None) -> ModelInfo:
    """Export a causal LM to ``out/`` as fp32 and check it against torch.

    Args:
        source: a Hugging Face model directory, a GGUF file, whose weights are dequantised, or a hub id.
        out: folder to write ``model.onnx``, ``tokenizer.json``, ``model.json`` and, where the source has one, the chat
            template to; made when absent.
        tokenizer: folder or file with ``tokenizer.json``, for a source that has none.
        name: the model's name; None takes it from the source.

    Raises:
        ModelError: the source is missing, is no causal LM, has no fast tokenizer, cannot be exported by optimum, or
            the exported graph differs from torch by more than TOLERANCE in a logit.
    """
    with progress(f"exporting {source}"):
        model = load_torch(source)
        out.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(source, tokenizer, out / TOKENIZER_FILE)
        _write_graph(model, out / GRAPH_FILE)
        info = write_info(out, _describe(model, out / GRAPH_FILE, name or _name_of(source)))
    with progress(f"comparing {out} with torch"):
        difference = compare_with_torch(model, Decoder.load(out))
    log.info("exported %s: largest logit difference to torch %.2g", info.name, difference)
    if not difference <= TOLERANCE:
        (out / INFO_FILE).unlink()
        raise ModelError(
            f"difference of {out / GRAPH_FILE} from torch must be at most {TOLERANCE} (got {difference:.3g})"
        )
    return info


def load_torch(source: str | Path, *, dtype: str = "float32") -> Any:
    """Load a causal LM for evaluation, in fp32 unless another `dtype` of torch is named.

    Raises:
        ModelError: the source is missing or is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    local = Path(source)
    if backend_of(str(source)) == "llama-cpp":
        return gguf_weights.load(local, dtype=dtype)
    if isinstance(source, Path) or local.exists() or str(source).startswith((".", "/", "~")):
        if not local.is_dir():
            raise ModelError(
                f"model source must be a model directory or a hub id (got {str(source)!r}, which does not exist)"
            )
        if not (local / "config.json").is_file():
            raise ModelError(
                f"model source must be a Hugging Face model directory (got one without {local / 'config.json'})"
            )
    try:
        config = AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"model source {str(source)!r} has no usable configuration: {exc}") from exc
    kinds = config.architectures or []
    if kinds and not any(k.endswith(("ForCausalLM", "LMHeadModel")) for k in kinds):
        raise ModelError(f"model source {str(source)!r} must be a causal language model (got {kinds[0]})")
    try:
        return AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype).eval()
    except (OSError, ValueError, RuntimeError) as exc:
        raise ModelError(f"model source {str(source)!r} cannot be loaded as a causal language model: {exc}") from exc


def _name_of(source: str | Path) -> str:
    return Path(source).stem if backend_of(str(source)) == "llama-cpp" else Path(str(source)).name


def _write_tokenizer(source: str | Path, given: Path | None, target: Path) -> None:
    if not given and backend_of(str(source)) == "llama-cpp":
        tokenizer_at(Path(source))[0].save(str(target))
        copy_chat_files(Path(source), target.parent, begins=gguf_weights.begins(Path(source)))
        return
    candidates = [given, given / TOKENIZER_FILE] if given else [Path(source) / TOKENIZER_FILE]
    for candidate in candidates:
        if candidate.is_file():
            shutil.copyfile(candidate, target)
            copy_chat_files(candidate.parent, target.parent)
            return
    if given:
        raise ModelError(f"tokenizer {str(given)!r} is no {TOKENIZER_FILE} and holds none")
    from transformers import AutoTokenizer

    missing = f"model source {str(source)!r} has no {TOKENIZER_FILE}: give the tokenizer's folder"
    if Path(source).is_dir() and not list(Path(source).glob("*token*")):
        raise ModelError(missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), use_fast=True)
        tokenizer.backend_tokenizer.save(str(target))
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            copy_chat_files(Path(folder), target.parent)
    except (OSError, ValueError, AttributeError, TypeError, ImportError) as exc:
        raise ModelError(f"{missing} ({exc})") from exc


def _write_graph(model: Any, path: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about every Python branch in the model's code
        try:
            onnx_export_from_model(model, output=Path(folder), task=TASK, do_validation=False, preprocessors=[])
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as exc:
            kind = type(model).__name__
            raise ModelError(f"optimum cannot export {kind} with a key/value cache: {exc}") from exc
        exported = onnx.load(str(Path(folder) / GRAPH_FILE))
    graph.expose_hidden(exported)
    graph.share_tied_head(exported)
    graph.save_graph(exported, path)


def _describe(model: Any, path: Path, name: str) -> ModelInfo:
    config = model.config
    inputs = {i.name: i for i in onnx.load(str(path), load_external_data=False).graph.input}
    past = [n for n in inputs if n.startswith("past_key_values.") and n.endswith(".key")]
    if not past:
        raise ModelError(f"{path} must be a graph with a key/value cache (got one without past_key_values inputs)")
    shape = [d.dim_value for d in inputs[past[0]].type.tensor_type.shape.dim]
    return ModelInfo(
        name=name,
        architecture=type(model).__name__,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        layers=len(past),
        kv_heads=shape[1],
        head_dim=shape[-1],
        hidden_size=config.hidden_size,
        eos_ids=_end_ids(config, model.generation_config),
        bos_id=begin_id(path.parent, config.bos_token_id),
        parameters=model.num_parameters(),
        quantisation="fp32",
        files={},
    )


def _end_ids(*configs: Any) -> tuple[int, ...]:
    """The ids that end a text. Chat models often name the end of an answer in their generation's configuration only."""
    given = [config.eos_token_id for config in configs if config is not None]
    flat = [token for eos in given for token in (eos if isinstance(eos, list) else [eos]) if token is not None]
    return tuple(dict.fromkeys(flat))


def compare_with_torch(model: Any, decoder: Decoder, *, seed: int = 0) -> float:
    """Largest difference of a logit between torch and the graph over a prefill, a cached step and a cached block."""
    import torch

    length = min(24, decoder.info.context)
    ids = np.random.default_rng(seed).integers(0, decoder.vocabulary.size, length).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()  # (length, rows of the table)
    expected = expected[:, : decoder.vocabulary.size]
    cache: Cache = decoder.empty_cache()
    worst, begin = 0.0, 0
    for end in (length // 2, length // 2 + 1, length):
        result = decoder.forward([DecoderInput(cache, ids[begin:end])])[0]
        worst = max(worst, float(np.abs(result.logits - expected[begin:end]).max()))
        cache, begin = result.cache, end
    return worst
