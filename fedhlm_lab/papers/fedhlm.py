"""FedHLM's tables and figures (arXiv 2507.00082, section VI), under its published rules and under the calibrated ones.

Published: the preset `fedhlm` (equations 1 to 10) with the live federation's guards. Calibrated: the preset `budget`
without peers. All policies see the same requests and the same laws.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from msgspec.structs import replace

from edge_agent.learner import Learner
from fedhlm.config import load
from fedhlm.progress import progress
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Config
from fedhlm_lab.papers.device import LabOutcome, LawDevice, LawTexts
from fedhlm_lab.papers.experiment import FedhlmExperiment
from fedhlm_lab.papers.laws import Laws
from fedhlm_lab.papers.pair import LabPair
from fedhlm_lab.papers.requests import LabRequest, LabSource, asked, dealt
from fedhlm_lab.papers.rerun import RerunRow, frozen, rerun
from fedhlm_lab.papers.rounds import RunRecord, run_rounds, verbatim_thresholds

PUBLISHED: Final = "published"
CALIBRATED: Final = "calibrated"
CENTRAL: Final = "centralised"
BASELINES: Final = ("Rand-HLM", "U-HLM", "speculative", "SLM alone")


class FedhlmRuns(NamedTuple):
    """All runs of the experiment with one seed.

    `rounds` are the runs by alpha and rules. `baselines` are the outcomes of all requests under policies that learn
    nothing. `verbatim` are the thresholds by equations (5) to (8) to the letter, and `llm_right` is the share of topics
    that the LLM alone names.
    """

    experiment: FedhlmExperiment
    source: str
    rounds: Mapping[tuple[float, str], RunRecord]
    baselines: Mapping[str, Sequence[LabOutcome]]
    verbatim: Sequence[float]
    llm_right: float
    reruns: Sequence[RerunRow]


def configs_of(experiment: FedhlmExperiment) -> dict[str, Config]:
    """The configuration of each policy."""
    changes: dict[str, tuple[str, dict[str, str]]] = {
        PUBLISHED: ("fedhlm", {}),
        CALIBRATED: ("budget", {"generation.peers": "none", "generation.budget": str(experiment.budget)}),
        "Rand-HLM": ("rand-hlm", {"generation.send_probability": str(experiment.send_probability)}),
        "U-HLM": ("u-hlm", {"generation.tau": str(experiment.fixed_tau)}),
        "speculative": ("speculative", {}),
        "SLM alone": ("slm-only", {}),
    }
    return {name: load(preset=preset, environ={}, flags=flags).config for name, (preset, flags) in changes.items()}


def run(experiment: FedhlmExperiment, pair: LabPair, source: LabSource, laws: Laws) -> FedhlmRuns:
    """Run everything with the experiment's first seed, which deals the articles out and is that of every request."""
    topics = [a.topic for a in source.articles]
    texts = LawTexts(laws, topics, pair.word)
    requests = asked(experiment.requests, len(topics), experiment.seed)
    configs = configs_of(experiment)

    def deal(alpha: float) -> list[list[list[LabRequest]]]:
        return dealt(
            requests,
            topics,
            clients=experiment.clients,
            rounds=experiment.rounds,
            alpha=alpha,
            seed=experiment.seed,
        )

    found: dict[tuple[float, str], RunRecord] = {}
    wanted = [(alpha, rules, experiment.clusters) for alpha in experiment.alphas for rules in (PUBLISHED, CALIBRATED)]
    for alpha, rules, clusters in [*wanted, (experiment.alphas[0], CENTRAL, 1)]:
        config = configs[PUBLISHED if rules == CENTRAL else rules]
        with progress(f"requests, seed {experiment.seed}, {rules}, alpha {alpha:g}", len(requests)) as ended:
            found[alpha, rules] = run_rounds(
                config, texts, deal(alpha), clusters=clusters, models=pair.fingerprints, ended=ended
            )
    baselines = {name: alone(configs[name], texts, requests, name) for name in BASELINES}
    greedy = [texts.right(r.article, texts.target(r.article, Sampling(0, 0.0))) for r in requests]
    last = found[experiment.alphas[0], PUBLISHED]
    learnt = configs[PUBLISHED].generation
    all_seen = with_beta(last, configs[PUBLISHED], texts, deal(experiment.alphas[0]))
    verbatim = verbatim_thresholds(
        all_seen, learnt.learning, start=learnt.tau, clients=experiment.clients, clusters=experiment.clusters
    )
    policies = {name: configs[name] for name in BASELINES}
    policies[PUBLISHED] = frozen("fedhlm", {}, last.outcomes[-1].made.tau)
    policies[CALIBRATED] = frozen("budget", {}, found[experiment.alphas[0], CALIBRATED].outcomes[-1].made.tau)
    reruns = rerun(policies, pair.fleet(), texts, requests[: experiment.sample])
    return FedhlmRuns(experiment, source.name, found, baselines, verbatim, float(np.mean(greedy)), reruns)


def alone(config: Config, texts: LawTexts, requests: Sequence[LabRequest], name: str) -> list[LabOutcome]:
    """All requests under a policy that learns nothing."""
    device = LawDevice(name, config.generation, Learner(config.federation, np.random.default_rng(0)), texts)
    with progress(f"requests, {name}", len(requests)) as ended:
        found = []
        for request in requests:
            found.append(device.answer(request))
            ended()
    return found


def with_beta(
    run: RunRecord, config: Config, texts: LawTexts, parts: Sequence[Sequence[Sequence[LabRequest]]]
) -> RunRecord:
    """The same doubts with the beta of every draft: what is known when everything is sent."""
    generation = replace(config.generation, gate="always", peers="none", threshold="none")
    device = LawDevice("all", generation, Learner(config.federation, np.random.default_rng(0)), texts)
    outcomes = [
        run.outcomes[0]._replace(round=number, client=client, made=device.answer(request))
        for number, clients in enumerate(parts)
        for client, requests in enumerate(clients)
        for request in requests
    ]
    return RunRecord(outcomes, [])


def share(outcomes: Sequence[LabOutcome], holds: Callable[[LabOutcome], bool]) -> float:
    """The share of outcomes for which something holds; 0 of none."""
    return sum(map(holds, outcomes)) / len(outcomes) if outcomes else 0.0


def settled(outcomes: Sequence[LabOutcome]) -> dict[str, float]:
    """The shares that device, peers and cloud settled."""
    return {name: share(outcomes, lambda made, name=name: made.source == name) for name in ("local", "peer", "cloud")}  # type: ignore[misc]


def in_round(run: RunRecord, number: int) -> list[LabOutcome]:
    """The outcomes of a round; -1 is the last."""
    last = max(o.round for o in run.outcomes)
    return [o.made for o in run.outcomes if o.round == (last if number < 0 else number)]


def of_client(run: RunRecord, client: int) -> list[LabOutcome]:
    """The outcomes of a client."""
    return [o.made for o in run.outcomes if o.client == client]


def entropy_of(outcomes: Sequence[LabOutcome], choices: int = 4) -> float:
    """The entropy of the committed tokens, over that of `choices` equally frequent ones; 0 without outcomes."""
    _, counts = np.unique([made.token for made in outcomes], return_counts=True)
    law = counts / max(1, counts.sum())
    return float(abs(-(law * np.log(law)).sum() / np.log(choices)))


def hit_ratio(outcomes: Sequence[LabOutcome]) -> float | None:
    """The share of lookups that the peers answered; None without lookups."""
    looked = [made for made in outcomes if made.looked_up]
    return share(looked, lambda made: SOURCES[made.source].by_peers) if looked else None
