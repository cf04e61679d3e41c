"""The experiments by name, and how each is run from its file to its result."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from fedhlm.errors import ConfigError, FedhlmError
from fedhlm.progress import progress
from fedhlm_lab.papers import (
    ablations,
    ablations_figures,
    capacity,
    capacity_figures,
    fedhlm,
    fedhlm_figures,
    pareto,
    pareto_figures,
    u_hlm,
    u_hlm_figures,
)
from fedhlm_lab.papers.experiment import (
    AblationsExperiment,
    CapacityExperiment,
    FedhlmExperiment,
    LabSample,
    ParetoExperiment,
    UhlmExperiment,
)
from fedhlm_lab.papers.findings import LabResult
from fedhlm_lab.papers.laws import LawPrompt, Laws
from fedhlm_lab.papers.pair import LabPair, decoder_of, paced
from fedhlm_lab.papers.requests import SHIPPED, source_of, text_prompts, topic_prompts
from fedhlm_lab.papers.workloads import NEWS, PromptChoice, prompts_of
from fedhlm_lab.sim.verifier_costs import PairCosts

QUICK: Final = "A smaller sample (--quick): the figures are for looking at, not for citing."
TOO_FEW: Final = "AG News was not found (FEDHLM_DATA names its folder), so these are few and simple texts."


def run_fedhlm(pair: LabPair, cache: Path, *, sample: LabSample) -> LabResult:
    """Run FedHLM's experiment."""
    experiment = FedhlmExperiment.load("fedhlm", sample)
    least = experiment.clients * experiment.rounds
    if experiment.requests < least:
        raise ConfigError("requests", experiment.requests, f"at least {least}, one for each client and round")
    source = source_of(experiment.articles)
    laws = laws_of(pair, cache, topic_prompts(source.articles, decoder_of(pair)))
    seeds = experiment.smaller(len(source.articles)).each_seed()
    runs = [fedhlm.run(one, pair, source, laws) for one in seeds]
    return marked(fedhlm_figures.result_of(runs), laws, source.name, sample=sample)


def run_u_hlm(pair: LabPair, cache: Path, *, sample: LabSample) -> LabResult:
    """Run U-HLM's and CU-HLM's experiment."""
    experiment = UhlmExperiment.load("u-hlm", sample)
    source, decoder = source_of(experiment.questions), decoder_of(pair)
    read = source_of(experiment.articles)
    texts = laws_of(pair, cache, text_prompts(read.articles, decoder, experiment.rows))
    questions = laws_of(pair, cache, topic_prompts(source.articles, decoder))
    asked = replace(experiment, articles=len(texts.prompts), questions=len(source.articles))
    runs = [u_hlm.run(one, pair, source, texts, questions) for one in asked.each_seed()]
    return marked(u_hlm_figures.result_of(runs), texts, source.name, sample=sample)


def run_pareto(pair: LabPair, cache: Path, *, sample: LabSample, chosen: PromptChoice = NEWS) -> LabResult:
    """Run all presets on all links."""
    experiment = paced(ParetoExperiment.load("pareto", sample), pair, given=sample.parameters)
    needed, articles = pareto.prompts_needed(experiment), experiment.articles
    prompts = prompts_of(chosen, pair, articles=articles, needed=needed, room=experiment.tokens)
    result = pareto_figures.result_of(pareto.run(experiment, pair, prompts.source, prompts.ids))
    return noted(result, {"workload": chosen.workload, **names_of(pair)}, prompts.source, sample=sample)


def run_capacity(pair: LabPair, cache: Path, *, sample: LabSample, chosen: PromptChoice = NEWS) -> LabResult:
    """Run fleets of many sizes on one verifier."""
    experiment, small, large = CapacityExperiment.load("capacity", sample), decoder_of(pair), pair.large_decoder
    if large is None:
        raise FedhlmError("costs must be measured on model folders (got toy models)")
    count, longest = experiment.prompts, small.info.context - experiment.tokens
    prompts = prompts_of(chosen, pair, articles=count, needed=count, room=experiment.tokens)
    if experiment.mixed and experiment.long > longest:
        raise ConfigError("long", experiment.long, f"at most {longest}: the SLM's context without `tokens`")
    costs = PairCosts.load_or_measure(cache.parent / "costs", f"{pair.small.name} {pair.large.name}", large, small)
    result = capacity_figures.result_of(capacity.run(experiment, pair, costs, prompts.source, prompts.ids))
    return noted(result, {"workload": chosen.workload, **names_of(pair)}, prompts.source, sample=sample)


def run_ablations(pair: LabPair, cache: Path, *, sample: LabSample) -> LabResult:
    """Run the system with each of its parts and without it."""
    experiment = paced(AblationsExperiment.load("ablations", sample), pair, given=sample.parameters)
    known = len(source_of(experiment.articles).articles)
    prompts = {}
    for name, wanted in experiment.workloads.items():
        least, all_seeds = (ablations.prompts_needed(experiment, wanted, seeds) for seeds in (1, experiment.seeds))
        needed = max(least, min(known, all_seeds))
        prompts[name] = prompts_of(
            PromptChoice(workload=name), pair, articles=needed, needed=needed, room=wanted.tokens
        )
    result = ablations_figures.result_of(ablations.run(experiment, pair, prompts))
    return noted(result, names_of(pair), next(iter(prompts.values())).source, sample=sample)


def names_of(pair: LabPair) -> dict[str, str]:
    """The names of both models."""
    return {"SLM": pair.small.name, "LLM": pair.large.name}


def laws_of(pair: LabPair, cache: Path, prompts: list[LawPrompt]) -> Laws:
    """The laws of a pair over prompts, from the cache if they are there."""
    with progress("laws of prompts", len(prompts)) as ended:
        return Laws.load_or_compute(cache, prompts, pair.small, pair.large, ended)


def marked(result: LabResult, laws: Laws, source: str, *, sample: LabSample) -> LabResult:
    """The result of cached laws; see `noted`."""
    models = {"SLM": laws.facts.small, "LLM": laws.facts.large, "laws": laws.facts.digest}
    return noted(result, models, source, sample=sample)


def noted(result: LabResult, models: Mapping[str, str], source: str, *, sample: LabSample) -> LabResult:
    """The result with what it was made from, and with a warning where it is small."""
    warnings = [*([QUICK] if sample.quick else []), *([TOO_FEW] if source == SHIPPED else [])]
    changed = {f"parameters of {sample.source}": ", ".join(sample.parameters)} if sample.source else {}
    return result._replace(facts={**result.facts, **models, **changed}, sentences=[*warnings, *result.sentences])


EXPERIMENTS: Final[dict[str, Callable[..., LabResult]]] = {
    "fedhlm": run_fedhlm,
    "u-hlm": run_u_hlm,
    "pareto": run_pareto,
    "capacity": run_capacity,
    "ablations": run_ablations,
}
