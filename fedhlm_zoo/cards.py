"""Write a model folder's README.md: what the model is, how it was made, and its figures before and after."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from fedhlm.decoding.decoder import GRAPH_FILE, ModelInfo, load_info
from fedhlm.decoding.vocabulary import TOKENIZER_FILE
from fedhlm_zoo.evaluate import Agreement, Evaluation
from fedhlm_zoo.info import graph_bytes
from fedhlm_zoo.report import QuantisationFigures, legend, table

CARD_FILE: Final = "README.md"

ARITHMETIC: Final[Mapping[str, str]] = {
    "fp32": "Weights and arithmetic are fp32.",
    "int8-dynamic": (
        "Weights are int8 with a scale per output; activations are quantised to 8 bits when the model runs, over all "
        "tokens of a call, except in the last product of each MLP, which is fp32. Logits therefore depend a little on how tokens are cut into calls, which a drafting model "
        "can afford: it changes how often a draft is accepted, never what is emitted."
    ),
    "weights-int8": (
        "Weights are stored as int8 with a scale per output and expanded when the model is loaded; all arithmetic is "
        "fp32. Logits do not depend on how tokens are cut into calls, as a verifying model needs."
    ),
    "weights-fp16": (
        "Weights are stored as fp16 and expanded when the model is loaded; all arithmetic is fp32. Logits do not "
        "depend on how tokens are cut into calls, as a verifying model needs."
    ),
}


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of one form of a model; `agreement` is with the target model, for a drafting model."""

    label: str
    graph_bytes: int
    evaluation: Evaluation
    agreement: Agreement | None = None


def write_card(
    folder: Path,
    *,
    purpose: str,
    training: str,
    figures: tuple[ModelFigures, ...] = (),
    quantisation: tuple[QuantisationFigures, ...] = (),
    limits: str = "",
) -> Path:
    """Write ``README.md`` into a model folder.

    Args:
        folder: a model folder; its ``model.json`` gives shape and quantisation.
        purpose: a sentence on what the model is for.
        training: how it was made, as Markdown.
        figures: one row per form of the model, the first as trained, the last as shipped.
        quantisation: what quantising cost, one row per form of the model.
        limits: what it should not be used for, as Markdown.

    Raises:
        ModelError: not a usable model folder.
    """
    path = folder / CARD_FILE
    card = render_card(
        load_info(folder),
        purpose=purpose,
        training=training,
        figures=figures,
        quantisation=quantisation,
        limits=limits,
    )
    path.write_text(card)
    return path


def render_card(
    info: ModelInfo,
    *,
    purpose: str,
    training: str,
    figures: tuple[ModelFigures, ...] = (),
    quantisation: tuple[QuantisationFigures, ...] = (),
    limits: str = "",
) -> str:
    """The text of a model card."""
    parts = [f"# {info.name}", purpose, "## What it is", _shape(info), ARITHMETIC.get(info.quantisation, "")]
    parts += ["## How it was made", training]
    if figures:
        parts += ["## Figures", _legend(figures), _table(figures)]
    if quantisation:
        parts += ["## Quantisation", legend(quantisation), table(quantisation)]
    if limits:
        parts += ["## Limits", limits]
    return "\n\n".join(p for p in parts if p) + "\n"


def _shape(info: ModelInfo) -> str:
    rows = (
        ("architecture", info.architecture),
        ("parameters", f"{info.parameters / 1e6:.2f} M"),
        ("layers", f"{info.layers}, hidden size {info.hidden_size}"),
        ("key/value heads", f"{info.kv_heads} of width {info.head_dim}"),
        ("vocabulary", f"{info.vocab_size} entries, byte-level BPE"),
        ("context", f"{info.context} tokens"),
        ("graph", f"`{GRAPH_FILE}`, {graph_bytes(info) / 1e6:.2f} MB, {info.quantisation}"),
        ("tokenizer", f"`{TOKENIZER_FILE}`, SHA-256 begins `{info.files[TOKENIZER_FILE].sha256[:16]}`"),
    )
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])


def _legend(figures: tuple[ModelFigures, ...]) -> str:
    articles = " / ".join(dict.fromkeys(str(f.evaluation.articles) for f in figures))
    text = (
        f"Measured on {articles} articles of the AG News test split. Topic: the likeliest of the four names after "
        "`Topic:` is right. Perplexity: per token of title and text."
    )
    agreements = [f.agreement for f in figures if f.agreement]
    if agreements:
        a = agreements[0]
        text += (
            f" Agreement: the large model continues {a.prompts} test titles; `greedy` is the share of {a.greedy_tokens} "
            f"positions with the same argmax, `gumbel` the share of {a.gumbel_tokens} positions where both draw the same "
            f"token at temperature {a.temperature} with shared noise."
        )
    return text


def _table(figures: tuple[ModelFigures, ...]) -> str:
    paired = any(f.agreement for f in figures)
    header = ["form", "graph", "topic", "perplexity"] + (["greedy", "gumbel"] if paired else [])
    rows = [header, ["---"] * len(header)]
    for f in figures:
        row = [f.label, f"{f.graph_bytes / 1e6:.2f} MB", f"{f.evaluation.topic_accuracy:.2%}"]
        row.append(f"{f.evaluation.perplexity:.2f}")
        if paired:
            row += [f"{f.agreement.greedy:.3f}", f"{f.agreement.gumbel:.3f}"] if f.agreement else ["", ""]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
