"""Clients, clusters and cloud in rounds of learning, on cached laws: the live federation's own parts, in lockstep.

In each round every client settles its requests. Then it contributes to its cluster (`ClusterFederation`, which checks
claims against the verdicts that passed), the clusters to the cloud (`Coordinator`), and what these know goes down again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cloud_verifier.coordinator import Coordinator
from edge_agent.events import Escalate
from edge_agent.learner import Learner
from edge_broker.federation import ClusterFederation
from fedhlm import choices
from fedhlm.learning.learnt_state import State
from fedhlm.learning.thresholds import (
    OPTIMISERS,
    LocalRound,
    PaperSettings,
    PaperUpdate,
    fleet_threshold,
)
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import SCHEMA_VERSION, Contribution, Fingerprint, Learned, UncertainTokens, Verdict
from fedhlm.settings import Config, Learning
from fedhlm_lab.papers.device import LabOutcome, LawDevice, LawTexts
from fedhlm_lab.papers.requests import LabRequest

Told = TypeVar("Told", Contribution, Learned)


class ClientOutcome(NamedTuple):
    """An outcome, with the numbers of its round (from 0) and its client."""

    round: int
    client: int
    made: LabOutcome


class RoundCost(NamedTuple):
    """What the end of a round took: messages, bytes of their payloads up and down, and seconds of computing."""

    messages: int
    up_bytes: int
    down_bytes: int
    seconds: float


class RunRecord(NamedTuple):
    """All outcomes of a run in order, and the published threshold after each round (None: under other rules).

    `costs` has what each round took.
    """

    outcomes: list[ClientOutcome]
    thresholds: list[float | None]
    costs: tuple[RoundCost, ...] = ()


class LockstepFederation:
    """Clients in clusters: client i belongs to cluster i modulo their number. `small` and `large` name the models."""

    def __init__(
        self, config: Config, texts: LawTexts, *, clients: int, clusters: int, models: tuple[Fingerprint, Fingerprint]
    ) -> None:
        self._clusters = [ClusterFederation(config.federation) for _ in range(clusters)]
        self._cloud = Coordinator.of(config.federation)
        self._models = models
        self._sent = 0
        self._carried: list[tuple[bool, int]] = []  # of this round's end: whether up, and the bytes
        self.devices = [self._device(config, texts, number) for number in range(clients)]

    def _device(self, config: Config, texts: LawTexts, number: int) -> LawDevice:
        learner = Learner(config.federation, np.random.default_rng(number))
        learner.meet(*self._models)
        learner.begin(0)
        name = f"client-{number}"
        return LawDevice(
            name,
            config.generation,
            learner,
            texts,
            publish=partial(self._publish, number % len(self._clusters)),
            saw=partial(self._saw, number % len(self._clusters), name, learner),
        )

    def _header(self, sender: str) -> dict[str, Any]:
        self._sent += 1
        return {"version": SCHEMA_VERSION, "sender": sender, "sequence": self._sent, "sent_ms": self._sent}

    def _members(self, cluster: int) -> list[LawDevice]:
        return self.devices[cluster :: len(self._clusters)]

    def _publish(self, cluster: int, name: str, block: Escalate) -> None:
        """Show a device's doubtful drafts to its cluster, as it does before it sends the block."""
        device = self._members(cluster)[0]
        if choices.PEERS[device.config.peers].asked and block.uncertain:
            message = UncertainTokens(**self._header(name), session=0, space="", items=block.uncertain)
            for one in self._members(cluster):
                one.peers.hear_doubts(message)

    def _saw(self, cluster: int, name: str, learner: Learner, verdict: Verdict, added: int, audit: bool) -> None:
        self._clusters[cluster].settled.note(name, verdict, learner.pair, added=added, audit=audit)

    def end_round(self, config: Config) -> RoundCost:
        """Contribute, pool, and tell everyone."""
        self._carried.clear()
        began_s = perf_counter()
        states = [self._close(number, config) for number in range(len(self._clusters))]
        for number, state in enumerate(states):
            name = f"cluster-{number}"
            contribution = self._carry(state.contribution(self._header(name)), up=True)
            self._cloud.members.take(name, contribution, self._now_s, wall_ms=self._sent)
        learned = self._cloud.members.close().learned(self._header("cloud"))
        for number, state in enumerate(states):
            cluster = self._clusters[number]
            cluster.note_above(self._carry(learned, up=False), wall_ms=self._sent)
            told = cluster.state_below(state).learned(self._header(f"cluster-{number}"))
            for device in self._members(number):
                device.learner.learned(self._carry(told, up=False))
        seconds = perf_counter() - began_s
        up_bytes, down_bytes = (sum(size for up, size in self._carried if up is way) for way in (True, False))
        return RoundCost(len(self._carried), up_bytes, down_bytes, seconds)

    def _carry(self, message: Told, *, up: bool) -> Told:
        """Count a message that travels, as it is encoded."""
        self._carried.append((up, len(encode(message))))
        return message

    @property
    def _now_s(self) -> float:
        return self._sent / 1000.0

    def _close(self, number: int, config: Config) -> State:
        cluster, members = self._clusters[number], self._members(number)
        for device in members:
            given = device.learner.contribution(config.generation, self._now_s)
            if given is None:
                continue
            thresholds, curves = given
            message = Contribution(
                **self._header(device.name),
                round=device.learner.round,
                members=1,
                thresholds=thresholds,
                curves=curves,
                evidence=device.learner.evidence(),
            )
            cluster.contribute(device.name, self._carry(message, up=True), self._now_s, wall_ms=self._sent)
        return cluster.members.close([device.name for device in members])


def run_rounds(
    config: Config,
    texts: LawTexts,
    parts: Sequence[Sequence[Sequence[LabRequest]]],
    *,
    clusters: int,
    models: tuple[Fingerprint, Fingerprint],
    ended: Callable[[], object] = lambda: None,
) -> RunRecord:
    """Run all rounds: `parts[r][k]` are the requests of client k in round r. Clients take turns, request by request."""
    fleet = LockstepFederation(config, texts, clients=len(parts[0]), clusters=clusters, models=models)
    outcomes: list[ClientOutcome] = []
    thresholds: list[float | None] = []
    costs: list[RoundCost] = []
    descends, start = choices.THRESHOLDS[config.generation.threshold].descends, config.generation.tau
    for number, clients in enumerate(parts):
        for turn in range(max(map(len, clients))):
            for client, requests in enumerate(clients):
                if turn < len(requests):
                    made = fleet.devices[client].answer(requests[turn])
                    outcomes.append(ClientOutcome(number, client, made))
                    ended()
        costs.append(fleet.end_round(config))
        known = fleet.devices[0].learner.threshold
        thresholds.append((start if known is None else known) if descends else None)
    return RunRecord(outcomes, thresholds, tuple(costs))


def observed(run: RunRecord, clients: int) -> list[list[list[tuple[float, float]]]]:
    """Doubt and beta of the drafts whose beta is known, by round and client."""
    rounds = max(o.round for o in run.outcomes) + 1
    pairs: list[list[list[tuple[float, float]]]] = [[[] for _ in range(clients)] for _ in range(rounds)]
    for number, client, made in run.outcomes:
        if made.beta is not None:
            pairs[number][client].append((made.doubt, made.beta))
    return pairs


def verbatim_thresholds(
    run: RunRecord, learning: Learning, *, start: float, clients: int, clusters: int
) -> list[float]:
    """Equations (5) to (8) to the letter on all drafts of a run whose (u, beta) are known, without the live guards.

    Every client sends what is above the common threshold. Under `fedavg`, as in the paper.
    """
    settings = PaperSettings.of(learning)._replace(optimiser="fedavg", local_steps=1)
    tau, trace = start, []
    for number, mine in enumerate(observed(run, clients)):
        updates: list[PaperUpdate] = []
        for seen in mine:
            sent = np.array([pair for pair in seen if pair[0] > tau], np.float64).reshape(-1, 2)
            updates.append(OPTIMISERS["fedavg"](LocalRound(sent, tau, tau, 0.0, 0.0, number, settings)))
        mean = fleet_threshold(updates, clusters)
        tau = tau if mean is None else mean
        trace.append(tau)
    return trace
