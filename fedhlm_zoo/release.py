"""Make the shipped models from finished training runs: export, quantise, measure, write the cards."""

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import msgspec

from fedhlm.decoding.decoder import GRAPH_FILE
from fedhlm.errors import ModelError
from fedhlm_zoo.cards import ModelFigures, write_card
from fedhlm_zoo.corpus import Article, load_ag_news
from fedhlm_zoo.evaluate import agreement, evaluate, open_model, sample
from fedhlm_zoo.export import export
from fedhlm_zoo.quantise import quantise
from fedhlm_zoo.recipe import RECIPE, Stage
from fedhlm_zoo.report import QuantisationFigures, compare, write_report

log = logging.getLogger(__name__)

FIGURES_FILE: Final = "figures.json"


class Shipped(NamedTuple):
    """One model of the pair: the name of its folder and last stage, and its quantisation."""

    name: str
    mode: str
    purpose: str
    limits: str


PAIR: Final = (
    Shipped(
        "llm",
        "weights-int8",
        "The large model of the shipped pair: it settles what devices draft, in the demo, the tests and the benchmarks.",
        "A small model of English news of 1996-2007 in the register of AG News. It invents names, figures and events. "
        "It is there to run and measure the system, not to inform anybody.",
    ),
    Shipped(
        "slm",
        "int8-dynamic",
        "The small model of the shipped pair: it drafts on the device what the large one settles.",
        "As for the large model. int8 products of activations differ a little with the batch they are computed in, which "
        "costs speed and never correctness, because the large model decides.",
    ),
)


def release(
    runs: Path,
    out: Path,
    data: Path | None = None,
    *,
    names: Sequence[str] = ("llm", "slm"),
    prompts: int = 100,
    articles: int | None = None,
    threads: int = 1,
) -> dict[str, Path]:
    """Make the shipped folders ``out/llm`` and ``out/slm`` from the last stages under `runs`.

    Args:
        runs: working folder of `recipe.run_recipe`, all stages finished.
        data: folder with ``ag_news/``, for the figures on the official test split.
        names: which of the pair; the SLM's agreement is measured against ``out/llm``.
        prompts: titles that the LLM continues for the agreement.
        articles: size of a sample of the test split; None takes all of it.

    Raises:
        ModelError: a stage is not finished.
        DataMissing: no test split.
    """
    test = load_ag_news("test", data)
    made: dict[str, Path] = {}
    for shipped in (s for s in PAIR if s.name in names):
        source = runs / shipped.name / "model"
        if not (source / "config.json").is_file():
            raise ModelError(f"{source} is missing: run 'fedhlm models train {runs}' to its end first")
        whole = runs / "onnx" / f"{shipped.name}-fp32"
        export(source, whole, tokenizer=runs / "tok", name=f"fedhlm-news-{shipped.name}")
        target = out / shipped.name
        quantise(whole, target, shipped.mode)
        llm = None if shipped.name == "llm" else out / "llm"
        figures = (
            _measure("fp32", whole, llm, sample(test, articles), sample(test, prompts), threads),
            _measure(shipped.mode, target, llm, sample(test, articles), sample(test, prompts), threads),
        )
        (target / FIGURES_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
        write_card(
            target, purpose=shipped.purpose, training=_training(shipped.name), figures=figures, limits=shipped.limits
        )
        made[shipped.name] = target
    return made


def quantised(
    folder: Path, out: Path, mode: str, texts: Sequence[str], *, others: Sequence[str] = ()
) -> tuple[QuantisationFigures, ...]:
    """Quantise an exported model, and write what that cost into its folder and its card.

    Args:
        folder: the model in fp32.
        out: folder of the quantised one.
        mode: see `fedhlm_zoo.quantise`.
        texts: to compare on.
        others: modes to report beside it.

    Raises:
        ModelError: see `quantise`.
    """
    info = quantise(folder, out, mode).info
    with TemporaryDirectory() as aside:
        beside = [Path(aside) / other for other in others if other != mode]
        for other in beside:
            quantise(folder, other, other.name)
        figures = compare(folder, [out, *beside], texts)
    write_report(out, figures)
    write_card(
        out,
        purpose=f"{info.name}, quantised.",
        training=f"`fedhlm models quantise --mode {mode}` made it of an exported model in fp32.",
        quantisation=figures,
    )
    return figures


def _measure(
    label: str, folder: Path, llm: Path | None, test: list[Article], titles: list[Article], threads: int
) -> ModelFigures:
    model = open_model(folder, threads=threads)
    figures = ModelFigures(
        label=label,
        graph_bytes=(folder / GRAPH_FILE).stat().st_size,
        evaluation=evaluate(model, test),
        agreement=agreement(model, open_model(llm, threads=threads), titles) if llm else None,
    )
    log.info("%s %s: %s", folder.name, label, figures)
    return figures


def _training(name: str) -> str:
    lines = [
        "Text: the AG News train split as found in public repositories (75,997 articles, none of the official test split or near it),",
        "in the form title, text, `Topic: ...`, and for the first stage of the LLM also BBC news and OneStopEnglish. The texts do not",
        "ship with the project. Muon for the matrices, AdamW for the rest, bf16 autocast on two cores; the topic's name weighs six",
        "times in the loss. Stages (tokens are steps x batch x length):",
        "",
        "| stage | from | learns from | steps | batch | length | seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in _lineage(name):
        config = stage.config
        teacher = f"the laws of {stage.teacher}" if stage.teacher else "the next token"
        cells = (
            stage.name,
            stage.start_from or "scratch",
            f"{teacher}, {stage.data}",
            config.steps,
            config.batch,
            config.length,
        )
        lines.append(f"| {' | '.join(map(str, cells))} | {config.seed} |")
    return "\n".join(lines)


def _lineage(name: str) -> list[Stage]:
    stages = {stage.name: stage for stage in RECIPE}
    line = [stages[name]]
    while (parent := line[0].start_from) is not None:
        line.insert(0, stages[parent])
    return line
