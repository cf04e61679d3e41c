"""Runs a Hugging Face model folder on torch, on the CPU or a CUDA device, as the cloud and an agent run any model.

A cache is a value: keys and values of one text, which no call changes. Requests of one call share one run of the model:
their pasts are padded on the left, and their ids on the right, where the mask hides both.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedhlm.decoding.caches import is_cut
from fedhlm.decoding.decoder import HASH_UP_TO_BYTES, DecoderInput, DecoderOutput, FileInfo, ModelInfo, file_digest
from fedhlm.decoding.grammar import Constrain, Grammars
from fedhlm.decoding.hub import CONFIG_FILE, configured_begin, end_ids, open_tokenizer
from fedhlm.decoding.vocabulary import TOKENIZER_FILE, vocabulary_of
from fedhlm.errors import ModelError

CUDA: Final = "CUDAExecutionProvider"  # the name by which settings ask for such a device, as for onnxruntime
RUN_MAX: Final = 128  # ids that one text feeds in a run on the CPU
RUN_MAX_ON_DEVICE: Final = 4_096
ENDS_BYTES: Final = 1024 * 1024  # of a large file that are hashed at either end


class TorchCache(NamedTuple):
    """Keys and values of `length` tokens: k0, v0, k1, v1, ..., each (1, kv_heads, length, head_dim)."""

    length: int
    tensors: tuple[Any, ...]

    def truncated(self, length: int) -> "TorchCache":
        """Return the cache of the first `length` tokens; self when that is all of them.

        Raises:
            ValueError: `length` is negative or more than the cache holds.
        """
        if not is_cut(length, self.length):
            return self
        return TorchCache(length, tuple(t[:, :, :length].clone() for t in self.tensors))


class TorchDecoder:
    """A loaded model of the transformers library. Calls block, and only one thread may make them at a time."""

    def __init__(self, model: Any, folder: Path, *, run_max: int = RUN_MAX) -> None:
        self.tokenizer = open_tokenizer(folder)
        self.vocabulary = vocabulary_of(folder)
        self.info = _described(model, folder)
        if self.vocabulary.size > self.info.vocab_size:
            raise ModelError(
                f"ids of {folder / TOKENIZER_FILE} must be below {self.info.vocab_size}, the size of the model's "
                f"vocabulary (got {self.vocabulary.size - 1})"
            )
        self.constrain: Constrain = Grammars(self.tokenizer, self.vocabulary.size, self.info.eos_ids).constrain
        self._model = model
        self._run_max = run_max
        self._hidden: Any = None
        model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        shape = (1, self.info.kv_heads, 0, self.info.head_dim)
        empty = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._empty = TorchCache(0, (empty,) * (2 * self.info.layers))

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        threads: int = 1,
        providers: Sequence[str] = (),
        keeps_memory: bool = True,
        dtype: str = "float32",
        **_others: object,
    ) -> "TorchDecoder":
        """Load a model folder.

        Args:
            folder: a Hugging Face model directory with ``config.json``, weights and ``tokenizer.json``.
            threads: the number of cores that one call may use; 0 is torch's choice.
            providers: with CUDA among them the model runs on a CUDA device.
            keeps_memory: is not used, as torch always keeps its memory.
            dtype: ``float32`` or ``bfloat16``, the type of weights and arithmetic.

        Raises:
            ModelError: the folder is no usable causal language model, or there is no CUDA device.
        """
        from fedhlm_zoo.export import load_torch

        del keeps_memory
        if threads:
            torch.set_num_threads(threads)
        on_device = CUDA in providers
        if on_device and not torch.cuda.is_available():
            raise ModelError(f"providers must leave out {CUDA} where torch finds no CUDA device")
        model = load_torch(Path(folder), dtype=dtype)
        if on_device:
            model = model.to("cuda")
        return cls(model, Path(folder), run_max=RUN_MAX_ON_DEVICE if on_device else RUN_MAX)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in a cache."""
        info = self.info
        return 2 * info.layers * info.kv_heads * info.head_dim * int(self._model.dtype.itemsize)

    def empty_cache(self) -> TorchCache:
        """Return the cache before the first token."""
        return self._empty

    def forward(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        """Run the ids of each request after its cache, as one batch. A single request is fed in pieces.

        Raises:
            ValueError: a request has no ids, has an id outside the vocabulary, or ends beyond `info.context`.
        """
        for cache, ids, _ in requests:
            if not ids:
                raise ValueError("ids of a request must be at least one (got none)")
            if min(ids) < 0 or max(ids) >= self.vocabulary.size:
                raise ValueError(f"ids must be in 0..{self.vocabulary.size - 1} (got {min(ids)}..{max(ids)})")
            if cache.length + len(ids) > self.info.context:
                raise ValueError(
                    f"cache and ids must be at most {self.info.context} tokens (got {cache.length} + {len(ids)})"
                )
        with torch.inference_mode():
            return self._run(requests) if len(requests) > 1 else [self._run_one(*requests)]

    def _run_one(self, request: DecoderInput) -> DecoderOutput:
        cache, ids, _ = request
        first = len(ids) - request.wanted
        logits, hiddens = [], []  # of each piece
        for begin in range(0, len(ids), self._run_max):
            piece = ids[begin : begin + self._run_max]
            rows = max(0, len(piece) - max(0, first - begin))
            (output,) = self._run([DecoderInput(cache, piece, rows)])
            cache = output.cache
            logits.append(output.logits)
            hiddens += [] if output.hidden is None else [output.hidden]
        return DecoderOutput(np.concatenate(logits), np.concatenate(hiddens), cache)

    def _run(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        from transformers import DynamicCache

        past = max(r.cache.length for r in requests)
        width = max(len(r.ids) for r in requests)
        ids = torch.zeros((len(requests), width), dtype=torch.int64)
        mask = torch.zeros((len(requests), past + width), dtype=torch.int64)
        positions = torch.zeros((len(requests), width), dtype=torch.int64)
        for row, (cache, new, _) in enumerate(requests):
            ids[row, : len(new)] = torch.tensor(new)
            mask[row, past - cache.length : past + len(new)] = 1
            positions[row, : len(new)] = torch.arange(cache.length, cache.length + len(new))
        held = DynamicCache()
        for layer in range(self.info.layers if past else 0):
            held.update(*(self._padded(requests, 2 * layer + part, past) for part in (0, 1)), layer)
        kept = max((width - len(r.ids) + r.wanted for r in requests if r.wanted), default=1)
        device = self._model.device
        answer = self._model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            cache_position=torch.arange(past, past + width, device=device),
            past_key_values=held,
            use_cache=True,
            logits_to_keep=kept,
        )
        logits = answer.logits[..., : self.vocabulary.size].float().cpu().numpy()
        hidden, self._hidden = self._hidden.float().cpu().numpy(), None
        tensors = [t for layer in held.layers for t in (layer.keys, layer.values)]
        return [self._part(row, r, logits, hidden, tensors, past, width) for row, r in enumerate(requests)]

    def _padded(self, requests: Sequence[DecoderInput], number: int, past: int) -> Any:
        """The keys or values of one layer for all requests, each padded on the left to `past` tokens."""
        tensors = [r.cache.tensors[number] for r in requests]
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat([torch.nn.functional.pad(t, (0, 0, past - t.shape[2], 0)) for t in tensors])

    def _part(
        self,
        row: int,
        request: DecoderInput,
        logits: NDArray[np.float32],
        hidden: NDArray[np.float32],
        tensors: list[Any],
        past: int,
        width: int,
    ) -> DecoderOutput:
        """One request's output: copies, so that its cache does not hold those of the whole batch."""
        count, length = len(request.ids), request.cache.length
        end = logits.shape[1] - (width - count)
        rows = slice(end - request.wanted, end)
        kept = slice(past - length, past + count)
        cache = TorchCache(length + count, tuple(t[row : row + 1, :, kept].clone() for t in tensors))
        return DecoderOutput(logits[row, rows].copy(), hidden[row, rows].copy(), cache)

    def _keep_hidden(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        self._hidden = inputs[0]


def _described(model: Any, folder: Path) -> ModelInfo:
    config = model.config
    heads = config.num_attention_heads
    return ModelInfo(
        name=folder.resolve().name,
        architecture=type(model).__name__,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        eos_ids=end_ids(folder),
        bos_id=configured_begin(folder),
        parameters=model.num_parameters(),
        quantisation={"float32": "fp32", "bfloat16": "bf16"}[str(model.dtype).removeprefix("torch.")],
        files=_listed(folder),
    )


def _listed(folder: Path) -> dict[str, FileInfo]:
    """Size and digest of the files that decide what the model computes. Of large weights only the ends are hashed."""
    found = [folder / CONFIG_FILE, folder / TOKENIZER_FILE, *sorted(folder.glob("*.safetensors"))]
    return {path.name: FileInfo(path.stat().st_size, _digest(path)) for path in found if path.is_file()}


def _digest(path: Path) -> str:
    size = path.stat().st_size
    if size <= HASH_UP_TO_BYTES:
        return file_digest(path)
    with path.open("rb") as file:
        begin = file.read(ENDS_BYTES)
        file.seek(size - ENDS_BYTES)
        return hashlib.sha256(begin + file.read()).hexdigest()
