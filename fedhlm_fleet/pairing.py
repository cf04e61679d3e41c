"""`fedhlm models pair`: from two models to the configuration of a fleet, with what the pair gives on each link."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from fedhlm.config import load
from fedhlm.decoding.models import load_model, tokenizer_at
from fedhlm.process.files import replacing
from fedhlm.progress import progress
from fedhlm_fleet.pair_files import PAIR_FILE
from fedhlm_fleet.pair_report import LINKS, PRESETS, PROPOSED_ON, LinkShapes, LinkSpeed, PairReport, toml_of
from fedhlm_fleet.proposal import PairRates, best_drafts, fastest
from fedhlm_fleet.turns import Speech, speech_of
from fedhlm_lab.papers import pareto
from fedhlm_lab.papers.desk import LlmJudge
from fedhlm_lab.papers.experiment import ParetoExperiment
from fedhlm_lab.papers.laws import DecoderLaws
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import CallTally, Paces, measured
from fedhlm_lab.sim.shipped import shipped_pair
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_zoo import pair
from fedhlm_zoo.evaluate import PROMPT_IDS, TEMPERATURE
from fedhlm_zoo.report import own_texts

FIGURES_FILE: Final = "pair.json"
# Presets of which the fastest on PROPOSED_ON is written; slm-only has no LLM.
PROPOSED: Final = ("budget", "exact", "colocated")
DRAFTS: Final = "colocated"  # the preset whose drafts at the cloud are proposed
SHAPED: Final = "exact"  # the preset whose pipeline is proposed
REPEATS: Final = 10  # calls of each size that a pace is measured with


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
    rates = PairRates(agreement.ranks, paces.device.seconds(1), paces.large)
    shapes = {link: fastest(rates, links.load(link).round_trip_s) for link in LINKS}
    tried = [(SHAPED, shape.shape, shape.settings) for shape in shapes[PROPOSED_ON]]
    tried.append((DRAFTS, "", {"drafts": best_drafts(rates._replace(step_s=paces.beside.seconds(1)))}))
    lab = _Lab(small, large, paces, prompts, amounts)
    speeds = [speed for preset in PRESETS for speed in lab.speeds(preset)]
    speeds += [lab.speeds(preset, shape, settings, (PROPOSED_ON,))[0] for preset, shape, settings in tried]
    chosen = max((s for s in speeds if s.link == PROPOSED_ON and s.preset in PROPOSED), key=lambda s: s.tokens_s)
    report = PairReport(
        slm=str(small),
        llm=str(large),
        projection=projection,
        agreement=agreement,
        draft_step_s=paces.device.seconds(1),
        step_s=paces.large.seconds(1),
        block_s=paces.large.seconds(8),
        speeds=tuple(speeds),
        shapes=tuple(LinkShapes(link=link, shapes=tuple(found)) for link, found in shapes.items()),
        preset=chosen.preset,
        pipeline=chosen.settings,
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


class _Lab:
    """A fleet of one agent in the simulator, whose models take the times of `paces`. Texts are greedy."""

    def __init__(self, small: Path, large: Path, paces: Paces, prompts: Sequence[list[int]], amounts: Amounts) -> None:
        self._judge = LlmJudge(DecoderLaws(load_model(large)))
        self._fleet = shipped_pair(small, large, paces=paces)
        self._prompts = prompts
        self._experiment = ParetoExperiment(
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

    def speeds(
        self,
        preset: str,
        shape: str = "",
        settings: Mapping[str, str | int] | None = None,
        on: Sequence[str] = LINKS,
    ) -> list[LinkSpeed]:
        """A preset on some links, with its own pipeline or with other settings of it."""
        whole, changed = self._experiment, dict(settings or {})
        needed = range(pareto.prompts_needed(whole))
        asked = [self._prompts[number % len(self._prompts)] for number in needed]
        # The texts of a link are the same whichever others are simulated.
        shares = {link: asked[whole.warm + place * whole.texts :][: whole.texts] for place, link in enumerate(LINKS)}
        asked = [*asked[: whole.warm], *(prompt for link in on for prompt in shares[link]), *asked[-whole.agents :]]
        experiment = replace(whole, links=tuple(on))
        flags = {f"generation.pipeline.{key}": str(value) for key, value in changed.items()}
        with progress(f"{preset} {shape}".strip() + " simulated"):
            found = run_virtual(
                pareto.one_seed(experiment, self._judge, self._fleet, CallTally(), preset, 0, asked, flags)
            )
        return [
            LinkSpeed(
                preset=preset,
                link=point.link,
                tokens_s=point.written.tokens / point.written.seconds,
                agreed=point.written.agreed / point.written.tokens,
                shape=shape,
                settings=changed,
            )
            for point in found.points
        ]
