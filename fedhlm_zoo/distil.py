"""Make a draft model of a large one: some of its layers, trained on its own laws.

The embedding table and the head stay those of the large model. A run is a folder with lessons (`fedhlm_zoo.teaching`),
checkpoints, a loss log and finally a Hugging Face model directory. A stopped run goes on where it was.
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedhlm.decoding.chat import TurnIds
from fedhlm.decoding.models import backend_of, tokenizer_at
from fedhlm.decoding.sampling import perturbed_argmax, scores
from fedhlm.decoding.vocabulary import TOKENIZER_FILE
from fedhlm.errors import ConfigError, ModelError
from fedhlm.process.files import replacing
from fedhlm.progress import progress
from fedhlm.protocol.messages import Sampling
from fedhlm_zoo import gguf_weights, teaching
from fedhlm_zoo.export import load_torch
from fedhlm_zoo.info import copy_chat_files
from fedhlm_zoo.teaching import LawLessons, Teacher
from fedhlm_zoo.train import Schedule, autocast, faster_precision, optimise

log = logging.getLogger(__name__)

RECIPE_FILE: Final = "recipe.json"
MODEL_FOLDER: Final = "model"
DRAFT_FILE: Final = "draft.gguf"
CARD_FILE: Final = "README.md"
FIGURES_FILE: Final = "figures.json"
AT_ONCE: Final = 8  # rows of a part of a batch
EXAMINED: Final = 8  # rows that acceptance is measured on
REST_MIN: Final = 1e-6  # of the mass outside a law's likeliest tokens


class DistilConfig(Schedule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a draft model is made.

    It has the given `layers` of the large model. `tokens` is how many the large model writes for it, answers and laws at
    `temperature`. The loss is the KL divergence from the large model's laws, plus `distance` times the squared distance
    of the last hidden states, relative to their length. The head is computed for the likeliest tokens of a part of a
    batch and `negatives` others, which stand for all that are left.
    """

    layers: tuple[int, ...]
    tokens: int
    temperature: float = 0.8
    distance: float = 1.0
    negatives: int = 4096
    batch: int = 8
    length: int = 256
    micro_batch: int = 8
    lr_matrix: float = 0.01
    lr_other: float = 0.001
    decay_share: float = 0.6


class _Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What a folder was begun with. `large` names the large model and `texts` the digest of the texts."""

    large: str
    texts: str
    config: DistilConfig


class Distilled(NamedTuple):
    """A draft model: its Hugging Face folder, its GGUF file if the large model is one, and figures of how well it drafts.

    `untrained` and `accepted` are the shares of tokens of the large model's own text that it drafts as they are, under
    shared noise, before and after the training.
    """

    folder: Path
    file: Path | None
    tokens: int
    untrained: float
    accepted: float


class LessonPart(NamedTuple):
    """LawLessons of a part of a batch as tensors; `candidates` are the sorted ids for which the head is computed, and
    `ln_weight` is how many tokens each of them stands for, as a logarithm."""

    ids: Tensor  # (rows, length)
    counted: Tensor  # (rows, length)
    likeliest: Tensor  # (rows, length, k)
    ln_p: Tensor  # (rows, length, k)
    hidden: Tensor  # (rows, length, width)
    candidates: Tensor  # (c,)
    ln_weight: Tensor  # (c,)


def config_of(large: Path, layers: tuple[int, ...], *, threads: int, **options: Any) -> DistilConfig:
    """The options of a run on `threads` threads; a single number as `layers` says how many are kept.

    Raises:
        ConfigError: the model has no such layers.
        ModelError: it cannot be loaded.
    """
    torch.set_num_threads(threads)
    total = load_torch(large).config.num_hidden_layers
    kept = chosen_layers(total, layers[0]) if len(layers) == 1 else layers
    micro_batch = math.gcd(options["batch"], AT_ONCE)
    precision = faster_precision()
    muon = precision == "bfloat16"
    return DistilConfig(layers=kept, micro_batch=micro_batch, precision=precision, muon=muon, **options)


def chosen_layers(total: int, count: int) -> tuple[int, ...]:
    """The first `count` - 1 of `total` layers and the last one.

    Raises:
        ConfigError: there are not so many.
    """
    if not 1 <= count <= total:
        raise ConfigError("layers", count, f"from 1 to {total}, the layers of the large model")
    return (*range(count - 1), total - 1)


def pruned(model: Any, layers: Sequence[int]) -> Any:
    """A copy of a causal LM with some of its layers.

    Raises:
        ConfigError: it has no such layer, or the layers are not in order.
    """
    from transformers import AutoModelForCausalLM

    total = model.config.num_hidden_layers
    if not layers or sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < total:
        raise ConfigError("layers", ",".join(map(str, layers)), f"ascending numbers from 0 to {total - 1}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    stack = _stack_of(model)
    names = {f"{stack}.{layer}.": f"{stack}.{place}." for place, layer in enumerate(layers)}
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith(f"{stack}."):
            state[name] = value
        elif (held := ".".join(name.split(".")[: stack.count(".") + 2]) + ".") in names:
            state[names[held] + name.removeprefix(held)] = value
    student = AutoModelForCausalLM.from_config(config).to(model.dtype)
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def _stack_of(model: Any) -> str:
    """The name of the list that holds a model's layers."""
    total = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return str(name)
    raise ConfigError("model", type(model).__name__, "a causal language model with a list of layers")


def parts_of(
    lessons: LawLessons, *, rows: int, vocabulary: int, negatives: int, seed: Sequence[int]
) -> Iterator[LessonPart]:
    """Cut the lessons of a batch into parts of `rows` rows, and draw the candidates of each."""
    for begin in range(0, len(lessons.ids), rows):
        part = [array[begin : begin + rows] for array in lessons]
        held = np.unique(part[2])
        others = np.setdiff1d(np.arange(vocabulary), held, assume_unique=True)
        count = min(negatives, len(others))
        drawn = np.random.default_rng((*seed, begin)).choice(others, count, replace=False)
        candidates = np.concatenate([held, drawn])
        weight = np.zeros(len(candidates), np.float32)
        weight[len(held) :] = math.log(len(others) / count) if count else 0.0
        order = np.argsort(candidates)
        tensors = [torch.from_numpy(array) for array in (*part, candidates[order], weight[order])]
        yield LessonPart(*tensors)


def losses_of(hidden: Tensor, head: nn.Module, part: LessonPart, *, temperature: float) -> tuple[Tensor, Tensor]:
    """The KL divergence of a part in nats, summed over its counted tokens, and the distance of hidden states.

    All tokens outside a law's likeliest ones count as one outcome. `hidden` (rows, length, width) is the small model's.
    """
    rows = hidden[part.counted]  # (n, width)
    bias = None if getattr(head, "bias", None) is None else head.bias[part.candidates]
    logits = functional.linear(rows, head.weight[part.candidates], bias).float() / temperature  # (n, c)
    places = torch.searchsorted(part.candidates, part.likeliest[part.counted])  # (n, k)
    ln_q = logits.gather(1, places) - torch.logsumexp(logits + part.ln_weight, dim=1, keepdim=True)
    ln_p = part.ln_p[part.counted]  # (n, k)
    p_rest = (1.0 - ln_p.exp().sum(1)).clamp(min=REST_MIN)
    q_rest = (1.0 - ln_q.exp().sum(1)).clamp(min=REST_MIN)
    kl = (ln_p.exp() * (ln_p - ln_q)).sum(1) + p_rest * (p_rest / q_rest).log()
    target = part.hidden[part.counted]
    distance = (rows.float() - target).square().sum(1) / target.square().sum(1)
    return kl.sum(), distance.sum()


def train_on(run: Path, student: Any, config: DistilConfig, files: Sequence[Path], vocabulary: int) -> Path:
    """Train a draft model on files of lessons; return the folder of the trained model."""
    head = student.get_output_embeddings()
    for parameter in {*head.parameters(), *student.get_input_embeddings().parameters()}:
        parameter.requires_grad_(False)
    lessons = _LessonOrder(files, config)

    def losses(batch: tuple[int, LawLessons]) -> Iterator[Tensor]:
        step, held = batch
        count = int(held.counted.sum())
        for part in parts_of(
            held,
            rows=config.micro_batch,
            vocabulary=vocabulary,
            negatives=config.negatives,
            seed=(config.seed, step),
        ):
            with autocast(config):
                hidden = student.base_model(part.ids, use_cache=False).last_hidden_state
                kl, distance = losses_of(hidden, head, part, temperature=config.temperature)
            yield (kl + config.distance * distance) / count

    optimise(run, student, config, lessons.batches, losses)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    student.save_pretrained(run / MODEL_FOLDER)
    return run / MODEL_FOLDER


class _LessonOrder:
    """Batches of lessons: rows in an order that depends on the seed and the epoch."""

    def __init__(self, files: Sequence[Path], config: DistilConfig) -> None:
        self._lessons = [teaching.load(path) for path in files]
        self._places = [(file, row) for file, held in enumerate(self._lessons) for row in range(len(held.ids))]
        self._config = config
        if len(self._places) < config.batch:
            raise ConfigError("tokens", config.tokens, f"at least those of {config.batch} rows of {config.length}")

    def batches(self, first_step: int) -> Iterator[tuple[int, LawLessons]]:
        """The batches from a step on, with the number of each."""
        per_epoch = len(self._places) // self._config.batch
        for step in range(first_step, self._config.steps):
            epoch, slot = divmod(step, per_epoch)
            order = np.random.default_rng((self._config.seed, epoch)).permutation(len(self._places))
            taken = [self._places[i] for i in order[slot * self._config.batch :][: self._config.batch]]
            rows = [[array[row] for array in self._lessons[file]] for file, row in taken]
            yield step, LawLessons(*(np.stack(column) for column in zip(*rows, strict=True)))


def distil(
    large: Path, out: Path, config: DistilConfig, *, turns: TurnIds, end_ids: tuple[int, ...], texts: Sequence[str]
) -> Distilled:
    """Make a draft model of a large one, or go on with it.

    Args:
        large: a Hugging Face folder or a GGUF file.
        out: folder of the run; the draft is in ``model/`` and, for a GGUF file, in ``draft.gguf``.
        config: how. Of a run that was begun, only `steps` and `tokens` may change; its arithmetic stays.
        turns: what the large model's template writes around turns.
        end_ids: the ids that end its texts.
        texts: texts to learn from as well.

    Raises:
        ConfigError: `out` was begun with something else, or the layers are not the model's.
        DataMissing: `texts` are less than one row.
        ModelError: the large model cannot be trained on.
    """
    config.check()
    if backend_of(str(large)) == "onnx":
        raise ModelError(f"model to distil must be a Hugging Face folder or a GGUF file (got {str(large)!r})")
    tokenizer, vocabulary = tokenizer_at(large)
    out.mkdir(parents=True, exist_ok=True)
    config = _recipe_of(out, large, texts, config)
    given = None
    if texts:
        given = teaching.rows_of_texts(
            tokenizer, texts, end_id=end_ids[0], begin=turns.opening[:1], length=config.length
        )
    size, heat = vocabulary.size, config.temperature
    lessons, model = out / "lessons", load_torch(large)

    @cache
    def teacher() -> Teacher:
        held = model if config.precision == "float32" else load_torch(large, dtype=config.precision)
        return Teacher(held, turns, end_ids, size, heat)

    files = teaching.gather(lessons, teacher, given=given, tokens=config.tokens, length=config.length, seed=config.seed)
    student = pruned(model, config.layers)
    examined = _examined(lessons, teacher, config)
    known = _figures(out).get("untrained")
    untrained = acceptance(student, model, examined, temperature=heat, vocabulary=size) if known is None else known
    _write_figures(out, {"untrained": untrained})
    folder = train_on(out, student, config, files, size)
    accepted = acceptance(student.eval(), model, examined, temperature=heat, vocabulary=size)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    copy_chat_files(large, folder, begins=turns.opening[:1] == (model.config.bos_token_id,))
    file = None
    if backend_of(str(large)) == "llama-cpp":
        file = gguf_weights.write(out / DRAFT_FILE, large, student, name=f"draft of {large.stem}")
    told = Distilled(folder, file, sum(teaching.load(path).counted.sum() for path in files), untrained, accepted)
    _write_figures(
        out, told._asdict() | {"folder": MODEL_FOLDER, "file": file and file.name, "tokens": int(told.tokens)}
    )
    (folder / CARD_FILE).write_text(_card(large, config, told, _losses(out)))
    return told


def acceptance(student: Any, model: Any, rows: LawLessons, *, temperature: float, vocabulary: int) -> float:
    """The share of the counted tokens of `rows` at which both models draw the same token with shared noise."""
    equal = count = 0
    with torch.inference_mode(), progress("rows compared", len(rows.ids)) as ended:
        for row, ids in enumerate(torch.from_numpy(rows.ids)):
            ours, theirs = (
                m(ids[None], use_cache=False).logits[0, :, :vocabulary].float().numpy() for m in (student, model)
            )
            sampling = Sampling(row, temperature)
            for at in np.flatnonzero(rows.counted[row]).tolist():
                drawn = [perturbed_argmax(scores(logits[at], sampling), row, at + 1) for logits in (ours, theirs)]
                equal += drawn[0] == drawn[1]
                count += 1
            ended()
    return equal / max(1, count)


def _examined(lessons: Path, teacher: Callable[[], Teacher], config: DistilConfig) -> LawLessons:
    """Conversations that the large model wrote, and from which nothing is learnt."""
    path = lessons / "examined.npz"
    if not path.is_file():
        teaching.save(path, teacher().write(0, config.length, config.seed + 1, rows=EXAMINED))
    return teaching.load(path)


def _recipe_of(out: Path, large: Path, texts: Sequence[str], config: DistilConfig) -> DistilConfig:
    """Check what `out` was begun with and note what is asked for; return the options that hold."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    asked = _Recipe(large=large.name, texts=digest, config=config)
    path = out / RECIPE_FILE
    if path.is_file():
        begun = msgspec.json.decode(path.read_bytes(), type=_Recipe)
        config = msgspec.structs.replace(config, precision=begun.config.precision, muon=begun.config.muon)
        asked = msgspec.structs.replace(asked, config=config)
        free = msgspec.structs.replace(config, steps=begun.config.steps, tokens=begun.config.tokens)
        if begun != msgspec.structs.replace(asked, config=free):
            raise ConfigError("out", str(out), "a new folder, or one begun with the same model, texts and options")
    with replacing(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(asked), indent=2) + b"\n")
    return config


def _figures(out: Path) -> dict[str, Any]:
    path = out / FIGURES_FILE
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _write_figures(out: Path, figures: dict[str, Any]) -> None:
    with replacing(out / FIGURES_FILE) as file:
        file.write(json.dumps(_figures(out) | figures, indent=2).encode() + b"\n")


def _losses(out: Path) -> list[tuple[int, float]]:
    """Step and loss of ten steps of the run, the last one among them."""
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    shown = sorted({round(place) for place in np.linspace(0, len(lines) - 1, 10)})
    return [(lines[place]["step"], lines[place]["loss"]) for place in shown]


def _card(large: Path, config: DistilConfig, told: Distilled, losses: Sequence[tuple[int, float]]) -> str:
    rows = "\n".join(f"| {step} | {loss:.3f} |" for step, loss in losses)
    return f"""# A draft model of {large.name}

Layers {", ".join(map(str, config.layers))} of {large.name}, with its embedding table and head, trained on its laws at a temperature
of {config.temperature:g} by `fedhlm models distil`. Its licence is that of {large.name}.

## How it was made

{config.steps} steps of {config.batch} rows of {config.length} tokens, from {told.tokens:,} tokens of which {large.name} wrote most itself.

| step | loss |
|---|---|
{rows}

## Figures

Drafts that {large.name} accepts under shared noise at {config.temperature:g}, on {EXAMINED} conversations that it wrote and from which
nothing was learnt: {told.untrained:.3f} before the training, {told.accepted:.3f} after it.
"""
