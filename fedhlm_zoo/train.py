"""Train a causal LM on news, or distil a small one from a large one, on the available cores.

A run is a folder with tokenised data, checkpoints, a loss log and finally a Hugging Face model directory. A stopped
run resumes from its last checkpoint. The order of the data depends on the seed and the step alone.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from fedhlm.errors import ConfigError, DataMissing
from fedhlm.process.files import replacing
from fedhlm.progress import progress
from fedhlm_zoo.corpus import TOPIC_LINE, Article

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Precision = Literal["bfloat16", "float32"]

END_ID: Final = 0
TOPIC_WEIGHT: Final = 6.0


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Size of a Llama-architecture model; `heads` also counts the key/value heads."""

    width: int
    layers: int
    heads: int
    mlp: int
    context: int = 512


SHAPES: Final = {
    "llm": Shape(width=384, layers=8, heads=6, mlp=1024),
    "slm": Shape(width=192, layers=4, heads=4, mlp=512),
    "tiny": Shape(width=32, layers=2, heads=2, mlp=64, context=128),
}


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`steps` of `batch` sequences of `length` tokens, computed in parts of `micro_batch` sequences.

    The learning rate warms up, stays constant, and then decays linearly to zero. Without `muon` AdamW trains the matrices
    as well: Muon always computes in bfloat16, which takes seconds a matrix on a processor without instructions for it.
    """

    steps: int
    batch: int = 32
    length: int = 512
    micro_batch: int = 8
    lr_matrix: float = 0.02
    lr_other: float = 0.003
    warmup: int = 40
    decay_share: float = 0.4
    weight_decay: float = 0.05
    seed: int = 7
    checkpoint_every: int = 100
    precision: Precision = "bfloat16"
    muon: bool = True

    def check(self) -> None:
        """Check that a batch can be cut into its parts.

        Raises:
            ConfigError: it cannot.
        """
        if self.batch % self.micro_batch:
            raise ConfigError("train.batch", self.batch, f"a multiple of micro_batch ({self.micro_batch})")


class TrainConfig(Schedule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run of a model of `shape`."""

    shape: Shape
    compile: bool = True


class Pack(msgspec.Struct, frozen=True):
    """Tokenised documents in one array, with the loss weight of every token."""

    ids: NDArray[np.uint16]  # (tokens,)
    weights: NDArray[np.float16]  # (tokens,)
    starts: NDArray[np.int64]  # (documents + 1,) offsets into ids

    def save(self, file: BinaryIO) -> None:
        np.savez(file, ids=self.ids, weights=self.weights, starts=self.starts)

    @staticmethod
    def load(path: Path) -> "Pack":
        with np.load(path) as arrays:
            return Pack(arrays["ids"], arrays["weights"], arrays["starts"])


def pack_documents(tokenizer: Tokenizer, articles: list[Article], news: list[str]) -> Pack:
    """Tokenise; each document begins with the end-of-text id, and the topic name weighs TOPIC_WEIGHT in the loss."""
    bodies = [a.document for a in articles] + news
    encoded = tokenizer.encode_batch(bodies, add_special_tokens=False)
    lengths = np.array([0] + [len(e.ids) + 1 for e in encoded])
    starts = np.cumsum(lengths)
    ids = np.full(starts[-1], END_ID, np.uint16)
    weights = np.ones(starts[-1], np.float16)
    for i, encoding in enumerate(encoded):
        ids[starts[i] + 1 : starts[i + 1]] = encoding.ids
        if i < len(articles):
            boundary = len(articles[i].body) + len(TOPIC_LINE)
            for j, (begin, _) in enumerate(encoding.offsets):
                if begin >= boundary:
                    weights[starts[i] + 1 + j] = TOPIC_WEIGHT
    return Pack(ids, weights, starts)


def batches(pack: Pack, config: TrainConfig, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, weights) of shape (batch, length + 1) from `first_step` on; documents are reshuffled every epoch."""
    need = config.batch * config.length
    per_epoch = (len(pack.ids) - 1) // need
    if per_epoch < 1:
        raise DataMissing(f"{len(pack.ids)} training tokens are fewer than one batch of {need}")
    epoch_of_order = -1
    ids, weights = pack.ids, pack.weights
    for step in range(first_step, config.steps):
        epoch, slot = divmod(step, per_epoch)
        if epoch != epoch_of_order:
            order = np.random.default_rng((config.seed, epoch)).permutation(len(pack.starts) - 1)
            spans = [slice(pack.starts[d], pack.starts[d + 1]) for d in order]
            ids = np.concatenate([pack.ids[s] for s in spans])
            weights = np.concatenate([pack.weights[s] for s in spans])
            epoch_of_order = epoch
        rows = [slot * need + r * config.length for r in range(config.batch)]
        yield (
            torch.from_numpy(np.stack([ids[r : r + config.length + 1] for r in rows]).astype(np.int64)),
            torch.from_numpy(np.stack([weights[r : r + config.length + 1] for r in rows]).astype(np.float32)),
        )


def new_model(shape: Shape, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.mlp,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, config: Schedule) -> float:
    """Share of the peak rate at `step`: linear warm-up, constant, then linear decay over the last `decay_share`."""
    decay_from = config.steps * (1 - config.decay_share)
    if step < config.warmup:
        return (step + 1) / config.warmup
    if step > decay_from:
        return max(0.0, (config.steps - step) / (config.steps - decay_from))
    return 1.0


def _optimizers(model: nn.Module, config: Schedule) -> list[torch.optim.Optimizer]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in trained if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    if not config.muon:
        matrices = []
    chosen = {id(p) for p in matrices}
    others = [p for _, p in trained if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=config.lr_other, betas=(0.9, 0.95), weight_decay=0.0)
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(
        matrices, lr=config.lr_matrix, weight_decay=config.weight_decay, adjust_lr_fn="original", momentum=0.95
    )
    return [muon, adam]


def _cross_entropy(logits: Tensor, ids: Tensor, weights: Tensor, _hidden_target: Tensor | None) -> Tensor:
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def _divergence(logits: Tensor, ids: Tensor, weights: Tensor, teacher: Tensor | None) -> Tensor:
    if teacher is None:
        raise ValueError("distillation needs the teacher's logits")
    p = functional.softmax(teacher.flatten(0, 1), dim=-1)
    ln_q = functional.log_softmax(logits.flatten(0, 1), dim=-1)
    return (-(p * ln_q).sum(-1) * weights[:, 1:].flatten()).sum()


def train(
    run: Path,
    config: TrainConfig,
    pack: Pack,
    vocab_size: int,
    *,
    start_from: Path | None = None,
    teacher_dir: Path | None = None,
) -> Path:
    """Train until `config.steps`, resuming from ``run/checkpoint.pt`` if it exists; return the model directory.

    With `teacher_dir` the loss is the student's cross-entropy under the teacher's law, whose gradient is that of the
    forward KL divergence. Without it the loss is that of the next token. `start_from` gives initial weights.
    """
    config.check()
    model = (
        LlamaForCausalLM.from_pretrained(start_from) if start_from else new_model(config.shape, vocab_size, config.seed)
    )
    teacher = LlamaForCausalLM.from_pretrained(teacher_dir).eval() if teacher_dir else None
    forward = torch.compile(model) if config.compile else model
    teach = torch.compile(teacher) if teacher is not None and config.compile else teacher
    loss_of = _divergence if teacher is not None else _cross_entropy

    def losses(batch: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        ids, weights = batch
        norm = float(weights[:, 1:].sum())
        for part, part_weights in zip(ids.split(config.micro_batch), weights.split(config.micro_batch), strict=True):
            with autocast(config):
                target = None
                if teach is not None:
                    with torch.no_grad():
                        target = teach(part[:, :-1], use_cache=False).logits.float()
                logits = forward(part[:, :-1], use_cache=False).logits
            yield loss_of(logits.float(), part, part_weights, target) / norm

    optimise(run, model, config, lambda first_step: batches(pack, config, first_step), losses)
    model.save_pretrained(run / "model")
    return run / "model"


def faster_precision() -> Precision:
    """The arithmetic in which this processor multiplies matrices faster. Without instructions for bfloat16 its products
    take several times as long as those of float32."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(left, right)
            times.append(time.perf_counter() - began)
        return min(times)

    return "bfloat16" if seconds(torch.bfloat16) < seconds(torch.float32) else "float32"


def autocast(config: Schedule) -> torch.autocast:
    """The arithmetic of a forward pass."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


def optimise(
    run: Path,
    model: nn.Module,
    config: Schedule,
    batches_from: Callable[[int], Iterator[Batch]],
    losses: Callable[[Batch], Iterator[Tensor]],
) -> None:
    """Take the steps of a schedule that ``run/checkpoint.pt`` does not hold yet.

    Args:
        run: folder of the checkpoint and the loss log.
        model: the parameters that need a gradient are trained.
        config: the schedule.
        batches_from: yields the batches from a step on; they must depend on the step alone.
        losses: yields the losses of the parts of a batch, whose sum is that of the batch.

    Raises:
        RuntimeError: a loss is not finite.
    """
    run.mkdir(parents=True, exist_ok=True)
    optimizers = _optimizers(model, config)
    checkpoint = run / "checkpoint.pt"
    first_step = _resume(checkpoint, model, optimizers)
    peaks = (config.lr_matrix, config.lr_other)[-len(optimizers) :]
    model.train()
    began = time.monotonic()
    tokens = config.batch * config.length
    with (
        (run / "loss.jsonl").open("a", encoding="utf-8") as log_file,
        progress(f"steps of {run.name}", max(0, config.steps - first_step)) as ended,
    ):
        for step, batch in enumerate(batches_from(first_step), start=first_step):
            scale = learning_rate(step, config)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * scale
            total = 0.0
            for loss in losses(batch):
                loss.backward()
                total += float(loss.detach())
            if not math.isfinite(total):
                raise RuntimeError(f"loss is {total} at step {step}")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done = step + 1
            rate = tokens * (done - first_step) / (time.monotonic() - began)
            log_file.write(json.dumps({"step": step, "loss": round(total, 4), "tokens_per_second": round(rate)}) + "\n")
            log_file.flush()
            if done % config.checkpoint_every == 0 or done == config.steps:
                _save(checkpoint, model, optimizers, done)
            ended()


def _resume(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    if not path.is_file():
        return 0
    state: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    step = int(state["step"])
    log.info("resuming %s at step %d", path.parent.name, step)
    return step


def _save(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    with replacing(path) as file:
        torch.save(state, file)
