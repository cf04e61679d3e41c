"""What quantising a model cost: how near it stays to fp32 on texts, and how fast both are on this machine."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from fedhlm.decoding.decoder import Cache, Decoder, DecoderInput, load_info
from fedhlm.decoding.invariance import block_difference
from fedhlm.progress import progress
from fedhlm_zoo.evaluate import EngineModel, evaluate_texts, likeness
from fedhlm_zoo.info import graph_bytes
from fedhlm_zoo.prompts import load_items

REPORT_FILE: Final = "quantisation.json"
TEXTS_MAX: Final = 64
BLOCK: Final = 8
CONTEXT: Final = 64  # tokens before what is timed
ROUNDS: Final = 5
CALLS: Final = 8  # of each model in a round


class QuantisationFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one form of a model, fp32 among them.

    `top1` and `kl` compare its laws with those of fp32 on `tokens` tokens (`fedhlm_zoo.evaluate.Likeness`).
    `step_tokens_s` is the speed one token at a time after CONTEXT tokens, `block_tokens_s` that in blocks of BLOCK, on
    one thread. `block_difference` is the largest change of a logit with the size of a block.
    """

    form: str
    graph_bytes: int
    tokens: int
    top1: float
    kl: float
    perplexity: float
    step_tokens_s: float
    block_tokens_s: float
    block_difference: float


def own_texts() -> list[str]:
    """The texts of the project's own news items, for who gives none."""
    return [item.body for item in load_items()[:TEXTS_MAX]]


def compare(whole: Path, folders: Sequence[Path], texts: Sequence[str]) -> tuple[QuantisationFigures, ...]:
    """Measure forms of one model, the fp32 model folder `whole` first. The first TEXTS_MAX texts are used.

    All are timed in turn, round by round, and the median counts, so that other load on the machine falls on all alike.

    Raises:
        ModelError: a folder is no model folder, the ids of two differ in meaning, or no text has two tokens.
    """
    forms = [whole, *folders]
    used = list(texts[:TEXTS_MAX])
    target = EngineModel(whole)
    steps, blocks = _speeds([Decoder.load(folder) for folder in forms])
    figures = []
    for folder, step, block in zip(forms, steps, blocks, strict=True):
        model = EngineModel(folder)
        near = likeness(model, target, used)
        figures.append(
            QuantisationFigures(
                form=load_info(folder).quantisation,
                graph_bytes=graph_bytes(load_info(folder)),
                tokens=near.tokens,
                top1=near.top1,
                kl=near.kl,
                perplexity=evaluate_texts(model, used).perplexity,
                step_tokens_s=step,
                block_tokens_s=block,
                block_difference=block_difference(Decoder.load(folder)),
            )
        )
    return tuple(figures)


def _speeds(decoders: Sequence[Decoder]) -> tuple[list[float], list[float]]:
    """Tokens a second of each decoder, one token at a time and in blocks."""
    length = min(CONTEXT, min(d.info.context for d in decoders) - BLOCK)
    ids = np.random.default_rng(0).integers(0, decoders[0].vocabulary.size, length + BLOCK).tolist()
    befores = [d.forward([DecoderInput(d.empty_cache(), ids[:length], 1)])[0].cache for d in decoders]
    rounds: list[list[tuple[float, float]]] = []
    with progress("rounds timed", ROUNDS) as ended:
        for _ in range(ROUNDS):
            rounds.append(
                [
                    (_rate(d, before, ids[length : length + 1]), _rate(d, before, ids[length:]))
                    for d, before in zip(decoders, befores, strict=True)
                ]
            )
            ended()
    middle = np.median(np.array(rounds), axis=0)  # (decoders, 2)
    return middle[:, 0].tolist(), middle[:, 1].tolist()


def _rate(decoder: Decoder, before: Cache, ids: list[int]) -> float:
    begun_s = time.perf_counter()
    for _ in range(CALLS):
        decoder.forward([DecoderInput(before, ids)])
    return CALLS * len(ids) / (time.perf_counter() - begun_s)


def table(figures: Sequence[QuantisationFigures]) -> str:
    """The figures as a table of Markdown."""
    rows = [
        ["form", "graph", "top-1", "KL", "perplexity", "step", f"blocks of {BLOCK}", "block difference"],
        ["---"] * 8,
    ]
    rows += [
        [
            f.form,
            f"{f.graph_bytes / 1e6:.2f} MB",
            f"{f.top1:.3f}",
            f"{f.kl:.4f}",
            f"{f.perplexity:.2f}",
            f"{f.step_tokens_s:.0f} tokens/s",
            f"{f.block_tokens_s:.0f} tokens/s",
            f"{f.block_difference:.2g}",
        ]
        for f in figures
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def legend(figures: Sequence[QuantisationFigures]) -> str:
    """What the table shows."""
    return (
        f"Against fp32 on {figures[0].tokens} tokens of text: top-1 is the share of positions with the same likeliest "
        "token, KL the mean of KL(fp32 || form) in nats. Speeds are those of one thread on the machine that quantised, "
        f"after {CONTEXT} tokens. Block difference is the largest change of a logit with the size of a block: the LLM "
        "of a cloud needs one below 0.02."
    )


def write_report(folder: Path, figures: Sequence[QuantisationFigures]) -> Path:
    """Write the figures into a model folder, as JSON."""
    path = folder / REPORT_FILE
    path.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
    return path
