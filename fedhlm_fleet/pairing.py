"""`fedhlm models pair`: from two models to the configuration of a fleet, with what the pair gives on each link."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from fedhlm.config import load
from fedhlm.decoding.models import load_model, tokenizer_at
from fedhlm.process.files import replacing
from fedhlm.progress import progress
from fedhlm_fleet.pair_files import PAIR_FILE
from fedhlm_fleet.turns import Speech, speech_of
from fedhlm_lab.papers import pareto
from fedhlm_lab.papers.experiment import ParetoExperiment
from fedhlm_lab.papers.laws import DecoderLaws
from fedhlm_lab.sim.pace import CallTally, Paces, measured
from fedhlm_lab.sim.shipped import shipped_pair
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_zoo import pair
from fedhlm_zoo.evaluate import PROMPT_IDS, TEMPERATURE, Agreement
from fedhlm_zoo.report import own_texts

FIGURES_FILE: Final = "pair.json"
PRESETS: Final = ("exact", "budget", "colocated", "slm-only")
PROPOSED: Final = (
    "budget",
    "exact",
    "colocated",
)  # of which the fastest on PROPOSED_ON is written; slm-only has no LLM
PROPOSED_ON: Final = "lte"
LINKS: Final = ("lan", "lte", "satellite")
REPEATS: Final = 10  # calls of each size that a pace is measured with


class LinkSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """A preset on a link in the simulator: tokens a second, and the share of tokens that the LLM would have written."""

    preset: str
    link: str
    tokens_s: float
    agreed: float


class PairReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a pair is and gives. Steps are seconds of one thread; `block_s` is that of the LLM for eight tokens."""

    slm: str
    llm: str
    projection: str
    agreement: Agreement
    draft_step_s: float
    step_s: float
    block_s: float
    speeds: tuple[LinkSpeed, ...]
    preset: str


class Amounts(NamedTuple):
    """How much is measured: prompts and tokens of the agreement, and texts and tokens of the simulator on each link."""

    prompts: int = 20
    tokens: int = 32
    texts: int = 2
    warm: int = 4


def make_pair(
    slm: Path,
    llm: Path,
    out: Path,
    *,
    texts: Sequence[str] = (),
    amounts: Amounts = Amounts(),  # noqa: B008 - frozen
) -> PairReport:
    """Make two models ready, measure them, and write ``pair.toml`` and ``pair.json`` into `out`.

    Args:
        slm: a model folder, exported or not, or a GGUF file.
        llm: the same for the LLM.
        out: folder; made when absent.
        texts: to measure and fit on; empty: the project's own.
        amounts: how much is measured.

    Raises:
        ModelError: a model cannot be used, or the two have different tokenizers.
        ConfigError: `out` is no folder, has too little space, or was begun with other models.
    """
    used = list(texts) or own_texts()
    pair.check_room(out, slm, llm)
    pair.check_tokenizers(slm, llm)
    pair.check_begun(out, slm, llm)
    small = pair.made_ready(slm, out / "slm", "int8-dynamic", used).resolve()
    large = pair.made_ready(llm, out / "llm", "weights-int8", used).resolve()
    projection = pair.fit_keys(small, used)
    prompts = prompts_of(speech_of(large), large, used, amounts.prompts)
    agreement = pair.compared(small, large, out, prompts, tokens=amounts.tokens, temperature=TEMPERATURE)
    paces = _paces(small, large)
    speeds = _simulated(small, large, paces, prompts, amounts)
    on = {speed.preset: speed.tokens_s for speed in speeds if speed.link == PROPOSED_ON}
    preset = max(PROPOSED, key=lambda name: on[name])
    report = PairReport(
        slm=str(small),
        llm=str(large),
        projection=projection,
        agreement=agreement,
        draft_step_s=paces.device.seconds(1),
        step_s=paces.large.seconds(1),
        block_s=paces.large.seconds(8),
        speeds=speeds,
        preset=preset,
    )
    with replacing(out / PAIR_FILE) as file:
        file.write(toml_of(report).encode())
    with replacing(out / FIGURES_FILE) as file:
        file.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    load(file=out / PAIR_FILE, environ={})
    return report


def prompts_of(speech: Speech, model: Path, texts: Sequence[str], count: int) -> list[list[int]]:
    """Ids of prompts: the first lines of texts as a user's turns, or without a template the beginnings of texts."""
    lines = [next(line for line in text.splitlines() if line.strip()) for text in texts[:count]]
    if speech.template is not None:
        return [list(speech.template.encode([{"role": "user", "content": line}])) for line in lines]
    tokenizer = tokenizer_at(model)[0]
    encoded = tokenizer.encode_batch(lines, add_special_tokens=False)
    return [[*speech.turns.opening, *e.ids[:PROMPT_IDS]] for e in encoded]


def _paces(small: Path, large: Path) -> Paces:
    """Times of both models on one thread of this machine; the SLM is taken to be as fast beside the LLM."""
    with progress("measuring steps and blocks"):
        device = measured(load_model(small, drafting=True), repeats=REPEATS)
        return Paces(device, device, measured(load_model(large), repeats=REPEATS))


def _simulated(
    small: Path, large: Path, paces: Paces, prompts: Sequence[list[int]], amounts: Amounts
) -> tuple[LinkSpeed, ...]:
    """Each preset on each link, with one agent and in greedy texts."""
    experiment = ParetoExperiment(
        title="pair",
        articles=len(prompts),
        seed=0,
        seeds=2,
        agents=1,
        presets=PRESETS,
        links=LINKS,
        warm=amounts.warm,
        texts=amounts.texts,
        tokens=amounts.tokens,
        device_s=paces.device,
        beside_s=paces.beside,
        large_s=paces.large,
    )
    fleet = shipped_pair(small, large, paces=paces)
    judge = DecoderLaws(load_model(large))
    asked = [prompts[number % len(prompts)] for number in range(pareto.prompts_needed(experiment))]
    speeds: list[LinkSpeed] = []
    with progress("presets simulated", len(PRESETS)) as ended:
        for preset in PRESETS:
            one = partial(pareto.one_seed, experiment, judge, fleet, CallTally(), preset, experiment.seed, asked)
            speeds += [
                LinkSpeed(
                    preset=preset,
                    link=point.link,
                    tokens_s=point.tokens / point.seconds,
                    agreed=point.agreed / point.tokens,
                )
                for point in run_virtual(one()).points
            ]
            ended()
    return tuple(speeds)


def toml_of(report: PairReport) -> str:
    """The configuration of a fleet with the pair."""
    return "\n".join(
        [
            "# Made by fedhlm models pair. It serves every part: fedhlm cloud|edge|agent --config pair.toml",
            f"preset = {msgspec.json.encode(report.preset).decode()}",
            "",
            "[agent]",
            f"model = {msgspec.json.encode(report.slm).decode()}",
            "",
            "[cloud]",
            f"model = {msgspec.json.encode(report.llm).decode()}",
            f"draft_model = {msgspec.json.encode(report.slm).decode()}",
            "",
        ]
    )


def table_of(report: PairReport) -> str:
    """What a pair gives, as text."""
    found: Mapping[tuple[str, str], LinkSpeed] = {(s.preset, s.link): s for s in report.speeds}
    shown = [["tokens/s", *LINKS, "as the LLM's"]]
    for preset in PRESETS:
        of = [found[preset, link] for link in LINKS]
        shown.append([preset, *(f"{s.tokens_s:.1f}" for s in of), f"{sum(s.agreed for s in of) / len(of):.0%}"])
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in shown
    )
