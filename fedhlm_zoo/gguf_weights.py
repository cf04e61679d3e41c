"""Weights of a GGUF file in torch: dequantised, and named as transformers names them."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.gguf import read_gguf
from fedhlm.errors import ModelError
from fedhlm.process.files import aside_of, replacing

PLAIN: Final = ("llama", "qwen2", "qwen3")  # architectures whose files hold what transformers holds
BEGUN: Final = ("llama3", "llama-v3", "llama-bpe")  # tokenizers of byte-level BPE that put a token before every text
BLOCK: Final = 32  # numbers with one scale
FORM: Final = "Q4_0"  # on a CPU llama.cpp multiplies with it faster than with any other


def load(path: Path, *, dtype: str = "float32") -> Any:
    """Load the model of a GGUF file as one of transformers.

    Raises:
        ModelError: the file cannot be used, or transformers does not know its kind of model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging as transformers_logging

    kind = read_gguf(path).get("general.architecture", str)
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        model = AutoModelForCausalLM.from_config(config)
        # `from_pretrained` would want accelerate, with which tied models can no longer be exported.
        held = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        missing, unknown = model.load_state_dict(held, strict=False)
    except ImportError as exc:
        raise ModelError(f"{path} needs gguf, which is not installed: pip install 'fedhlm[models]'") from exc
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as exc:
        raise ModelError(f"{path} must be of a kind that transformers reads (got {kind!r}: {exc})") from exc
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unknown or set(missing) - tied:
        raise ModelError(f"{path} must hold the weights of {kind!r} (missing {missing}, unknown {unknown})")
    return model.to(getattr(torch, dtype)).eval()


def begins(path: Path) -> bool:
    """Whether a begin-of-text token precedes every text. Files that do not say so follow llama.cpp's defaults.

    Raises:
        ModelError: the file cannot be used.
    """
    gguf = read_gguf(path)
    usual = gguf.get("tokenizer.ggml.model", str) == "llama" or gguf.get("tokenizer.ggml.pre", str) in BEGUN
    return bool(gguf.get("tokenizer.ggml.add_bos_token", bool, usual))


def write(path: Path, source: Path, model: Any, *, name: str, form: str = FORM) -> Path:
    """Write a model of fewer layers as a GGUF file, with the tokenizer and template of `source`.

    Args:
        path: the file to write.
        source: the GGUF file whose layers the model has some of.
        model: the model, as transformers has it.
        name: its name in the file.
        form: how matrices are stored, by the format's name of it.

    Raises:
        ModelError: the kind of model is not one of PLAIN, whose weights files hold as transformers does.
        OSError: the file cannot be written.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    kind = read_gguf(source).get("general.architecture", str)
    if kind not in PLAIN:
        raise ModelError(f"{source} must be of the kind {' or '.join(PLAIN)} for a draft as a GGUF file (got {kind!r})")
    config, state = model.config, model.state_dict()
    names = dict(get_gguf_hf_weights_map(model))
    if config.tie_word_embeddings:
        names.pop("output.weight", None)
    reader = GGUFReader(source)
    with replacing(path):
        writer = GGUFWriter(aside_of(path), kind)
        replaced = {f"{kind}.block_count": config.num_hidden_layers, "general.name": name}
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
                continue
            inner = field.types[1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(key, replaced.get(key, field.contents()), field.types[0], sub_type=inner)
        for name_in_file, held in names.items():
            array = state[held].float().numpy()
            if kind == "llama" and (heads := _heads(name_in_file, config)):
                array = _interleaved(array, heads)
            stored, stored_as = _stored(array, form)
            writer.add_tensor(name_in_file, stored, raw_dtype=stored_as)
        for tensor in reader.tensors:  # such as the factors of rotations, which are no weights
            if tensor.name not in names and not tensor.name.startswith(("blk.", "output.")):
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _heads(name: str, config: Any) -> int:
    """How many heads a tensor of queries or keys has; 0 for another tensor."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else 0


def _interleaved(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head as llama.cpp rotates them: those of the first and the second half in turn."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    found: NDArray[np.float32] = halves.swapaxes(1, 2).reshape(array.shape)
    return found


def _stored(array: NDArray[np.float32], form: str) -> tuple[NDArray[Any], Any]:
    """A tensor as the file holds it; matrices whose rows cannot be cut into blocks, and vectors, stay in float32."""
    from gguf import GGMLQuantizationType, quants

    wanted = GGMLQuantizationType[form]
    if array.ndim < 2 or array.shape[1] % BLOCK:
        return array, GGMLQuantizationType.F32
    return quants.quantize(array, wanted), wanted
