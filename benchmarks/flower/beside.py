"""The published threshold federation beside Flower, on the same observations: thresholds, bytes and seconds a round.

    python benchmarks/flower/beside.py observe /tmp/observations.json
    /tmp/flower/bin/python benchmarks/flower/peer.py /tmp/observations.json /tmp/peer.json
    python benchmarks/flower/beside.py report /tmp/observations.json /tmp/peer.json --out docs/results/flower

The second line runs in an environment of its own (`requirements.txt`). Observations are the doubts and rejection
probabilities of FedHLM's experiment, client by client and round by round.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedhlm.errors import FedhlmError
from fedhlm.learning.thresholds import PaperSettings
from fedhlm.settings import Config
from fedhlm_lab.papers import catalogue, fedhlm
from fedhlm_lab.papers.device import LawTexts
from fedhlm_lab.papers.experiment import FedhlmExperiment, LabSample
from fedhlm_lab.papers.findings import ChartSeries, LabChart, LabResult, LabTable
from fedhlm_lab.papers.laws import Laws, default_cache
from fedhlm_lab.papers.pair import LabPair, decoder_of, folder_pair
from fedhlm_lab.papers.report import write
from fedhlm_lab.papers.requests import LabRequest, LabSource, asked, dealt, source_of, topic_prompts
from fedhlm_lab.papers.rounds import observed, run_rounds, verbatim_thresholds
from fedhlm_lab.studies.command_line import Parser
from fedhlm_lab.studies.command_line import run as run_study

AGREE: Final = 1e-9


def observations(experiment: FedhlmExperiment, pair: LabPair, source: LabSource, laws: Laws) -> dict[str, Any]:
    """Run FedHLM's published rules; what each client saw in each round, and what our federation made of it."""
    topics = [article.topic for article in source.articles]
    texts = LawTexts(laws, topics, pair.word)
    requests = asked(experiment.requests, len(topics), experiment.seed)
    config = fedhlm.configs_of(experiment)[fedhlm.PUBLISHED]
    parts: list[list[list[LabRequest]]] = dealt(
        requests, topics, clients=experiment.clients, rounds=experiment.rounds, alpha=experiment.alphas[0],
        seed=experiment.seed,
    )  # fmt: skip
    run = run_rounds(config, texts, parts, clusters=experiment.clusters, models=pair.fingerprints)
    everything = fedhlm.with_beta(run, config, texts, parts)
    learning, start = config.generation.learning, config.generation.tau
    ours = verbatim_thresholds(
        everything, learning, start=start, clients=experiment.clients, clusters=experiment.clusters
    )
    return {
        "source": source.name,
        "models": [laws.facts.small, laws.facts.large],
        "clusters": experiment.clusters,
        "start": start,
        "rule": rule_of(config),
        "rounds": observed(everything, experiment.clients),
        "ours": ours,
        "guarded": run.thresholds,
        "costs": [cost._asdict() for cost in run.costs],
    }


def rule_of(config: Config) -> dict[str, float]:
    """The constants of the rule, by the names of `published.Rule`."""
    known = PaperSettings.of(config.generation.learning)
    return {
        "gamma": known.gamma,
        "learning_rate": known.learning_rate,
        "decay": known.decay,
        "regularisation": known.lam,
    }


def report_of(known: dict[str, Any], peer: dict[str, Any]) -> LabResult:
    """Both trajectories and costs side by side.

    Raises:
        FedhlmError: the thresholds differ by more than AGREE.
    """
    ours, theirs = known["ours"], peer["thresholds"]
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if apart > AGREE:
        raise FedhlmError(f"thresholds must agree to {AGREE:g} (got {apart:g})")
    rounds = list(range(1, len(ours) + 1))
    trajectory = [
        (number, a, b, abs(a - b), c) for number, a, b, c in zip(rounds, ours, theirs, known["guarded"], strict=True)
    ]
    costs = [
        (
            name,
            *(round(_middle(side, key)) for key in ("messages", "up_bytes", "down_bytes")),
            1000.0 * _middle(side, "seconds"),
        )
        for name, side in (("this federation", known["costs"]), ("Flower's simulation", peer["costs"]))
    ]
    clients, pairs = len(known["rounds"][0]), sum(len(p) for clients in known["rounds"] for p in clients)
    series = [
        ChartSeries("this federation, equations 5 to 8", rounds, ours),
        ChartSeries("Flower", rounds, theirs),
        ChartSeries("this federation with its guards, live", rounds, known["guarded"]),
    ]
    return LabResult(
        "flower",
        "The published threshold federation beside Flower",
        {
            "source": known["source"],
            "clients, clusters, rounds": f"{clients}, {known['clusters']}, {len(rounds)}",
            "observations": pairs,
            "SLM": known["models"][0],
            "LLM": known["models"][1],
        },
        [
            f"Flower's thresholds and ours differ by at most {apart:.2g} over {len(rounds)} rounds.",
            ("Bytes are those of payloads: msgpack here, and Flower's protobuf there, without MQTT's and gRPC's own. Ours "
            "hold a certificate's evidence besides the threshold, and pass an edge, so that there are messages between "
            "clusters and cloud as well. Seconds are those of computing on one machine without a network: ours of the "
            "federation's code in one process, Flower's of its simulation with Ray."),
            "The live federation guards the published averages against liars, so its own thresholds are lower.",
        ],
        [],
        [
            LabTable("costs", "The middle round", ("federation", "messages", "bytes up", "bytes down", "milliseconds"), costs),
            LabTable(
                "trajectory", "The threshold after each round",
                ("round", "this federation", "Flower", "apart", "with guards"), trajectory,
            ),
        ],
        [LabChart("fig-thresholds", "The threshold after each round", "round", "tau", "line", series)],
    )  # fmt: skip


def _middle(costs: Sequence[dict[str, float]], key: str) -> float:
    return float(np.median([cost[key] for cost in costs]))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog="beside.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    observe = commands.add_parser("observe")
    observe.add_argument("observations", type=Path)
    observe.add_argument("--quick", action="store_true", help="a smaller sample")
    report = commands.add_parser("report")
    report.add_argument("observations", type=Path)
    report.add_argument("peer", type=Path)
    report.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.command == "observe":
        experiment = FedhlmExperiment.load("fedhlm", LabSample(options.quick))
        pair, source = folder_pair(), source_of(experiment.articles)
        laws = catalogue.laws_of(pair, default_cache(), topic_prompts(source.articles, decoder_of(pair)))
        found = observations(experiment.smaller(len(source.articles)), pair, source, laws)
        options.observations.write_text(json.dumps(found) + "\n", "utf-8")
        return 0
    known, peer = (json.loads(path.read_text("utf-8")) for path in (options.observations, options.peer))
    result = report_of(known, peer)
    write(result, options.out)
    print("\n".join(result.sentences))
    return 0


if __name__ == "__main__":
    sys.exit(run_study(main, "beside.py"))
