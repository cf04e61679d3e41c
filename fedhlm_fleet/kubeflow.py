"""The steps of FedHLM's pipeline on Kubeflow (arXiv 2507.00082, Fig. 3), each from files to a file of JSON.

`deploy/kubeflow/pipeline.py` runs each step in the image of its part: drafting, routing, validating and optimising in
an agent's, the fallback in a cloud's, the aggregation in an edge's. Rules and models are those of the live parts. A
request is one token after a prompt, as in the paper.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from fedhlm.config import load
from fedhlm.decoding.couplings import rejection_probability
from fedhlm.learning.thresholds import (
    OPTIMISERS,
    LocalRound,
    PaperSettings,
    PaperUpdate,
    fleet_threshold,
)
from fedhlm.peers.context_keys import load_projection, unpack_key
from fedhlm.peers.neighbours import Memory
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Generation

PRESET: Final = "fedhlm"
MEMORY: Final = 4_096  # verified tokens that routing remembers


class DraftedToken(msgspec.Struct, frozen=True):
    """A draft after a prompt: who drafted it, its probability, its doubt, and its context key."""

    client: int
    ids: list[int]
    token: int
    prob: float
    doubt: float
    key: bytes


class RoutedToken(msgspec.Struct, frozen=True):
    """A draft and where it goes: `source` settles it as `token`; empty: the LLM must."""

    draft: DraftedToken
    token: int
    source: str


class FallbackToken(msgspec.Struct, frozen=True):
    """A token that the LLM settled, and the LLM's probability of the draft."""

    place: int
    token: int
    prob: float


class LocalThreshold(msgspec.Struct, frozen=True):
    """A client's threshold after a round, and the number of tokens that it transmitted."""

    client: int
    threshold: float
    tokens: int


class RoundReport(msgspec.Struct, frozen=True):
    """What a round settled by whom, u and beta of what was transmitted by client, and the verified tokens."""

    settled: dict[str, int]
    observed: list[tuple[int, float, float]]
    verified: list[tuple[bytes, int]]


def settings() -> Generation:
    """The settings of the preset `fedhlm`."""
    return load(preset=PRESET, environ={}).config.generation


def draft(texts: Sequence[str], clients: int) -> list[DraftedToken]:
    """SLM inference: client k drafts a token after every k-th text, with its doubt."""
    from edge_agent.model import Slm
    from fedhlm.decoding.decoder import Decoder
    from fedhlm.decoding.text import encode_prompt
    from fedhlm_zoo.shipped import model_folder

    config, folder = settings(), model_folder("", "slm")
    decoder = Decoder.load(folder, threads=1)
    slm = Slm(decoder, load_projection(folder, decoder.info.hidden_size))
    found = []
    for number, text in enumerate(texts):
        ids = encode_prompt(decoder.tokenizer, text, decoder.info.bos_id)
        drawn = slm.draft(ids, Sampling(number, 0.0, 1.0, config.coupling), config.uncertainty)
        found.append(DraftedToken(number % clients, list(ids), drawn.token, drawn.prob, drawn.uncertainty, drawn.key))
    return found


def route(drafts: Sequence[DraftedToken], tau: float, verified: Sequence[tuple[bytes, int]]) -> list[RoutedToken]:
    """Routing decision: a draft is kept, or reused from a near context, or goes to the LLM."""
    from edge_agent.gate import GATES, Settings

    config = settings()
    gate = GATES[config.gate](Settings(tau, config.send_probability, 0))
    memory = Memory(MEMORY)
    for key, token in verified:
        memory.add(unpack_key(key), token, "peer")
    routed = []
    for one in drafts:
        if not gate(one.doubt, len(one.ids)):
            routed.append(RoutedToken(one, one.token, "local"))
            continue
        near = memory.nearest(unpack_key(one.key), config.consensus.votes)
        reused = near is not None and near.similarity >= config.consensus.similarity and near.token == one.token
        routed.append(RoutedToken(one, one.token, "peer" if reused else ""))
    return routed


def fall_back(routed: Sequence[RoutedToken]) -> list[FallbackToken]:
    """LLM fallback: the cloud's own verifier settles what nobody else did."""
    from cloud_verifier.verifier import Block, Session, settle
    from fedhlm.decoding.decoder import Decoder, DecoderInput
    from fedhlm_zoo.shipped import model_folder

    config, decoder = settings(), Decoder.load(model_folder("", "llm"), threads=1)
    eos_ids, found = frozenset(decoder.info.eos_ids), []
    for place, one in enumerate(routed):
        if one.source:
            continue
        ids, sampling = one.draft.ids, Sampling(place, 0.0, 1.0, config.coupling)
        steps = settle(
            Session(sampling, decoder.vocabulary.size, eos_ids, list(ids)),
            Block(len(ids), [one.draft.token], 0, 0, [b""]),
        )
        feed = next(steps)
        rows = decoder.forward([DecoderInput(decoder.empty_cache(), feed.ids, feed.rows)])[0].logits
        try:
            steps.send(rows)
        except StopIteration as end:
            accepted, follow, probs = end.value[:3]
            found.append(FallbackToken(place, one.draft.token if accepted else follow[0], probs[0]))
    return found


def validate(routed: Sequence[RoutedToken], settled: Sequence[FallbackToken]) -> RoundReport:
    """Result validation: the final tokens by source, and the observations for the thresholds."""
    by_place = {one.place: one for one in settled}
    counts: dict[str, int] = {}
    observed, verified = [], []
    for place, one in enumerate(routed):
        source = one.source or "cloud"
        counts[source] = counts.get(source, 0) + 1
        if not one.source:
            known = by_place[place]
            beta = rejection_probability(one.draft.prob, known.prob)
            observed.append((one.draft.client, one.draft.doubt, beta))
            verified.append((one.draft.key, known.token))
    return RoundReport(counts, observed, verified)


def optimise(report: RoundReport, tau: float, number: int, clients: int) -> list[LocalThreshold]:
    """Threshold optimisation: each client's step by equation (6); `number` counts rounds from 0."""
    learning = settings().learning
    constants, found = PaperSettings.of(learning), []
    for client in range(clients):
        pairs = np.array([(u, beta) for one, u, beta in report.observed if one == client], np.float64).reshape(-1, 2)
        update = OPTIMISERS[learning.optimiser](LocalRound(pairs, tau, tau, 0.0, 0.0, number, constants))
        found.append(LocalThreshold(client, update.threshold, update.count))
    return found


def aggregate(local: Sequence[LocalThreshold], tau: float, clusters: int) -> float:
    """Aggregation: equation (7) in each cluster, then (8); `tau` where nobody transmitted."""
    updates = [PaperUpdate(one.threshold, one.tokens, 0.0, 1) for one in local]
    found = fleet_threshold(updates, clusters)
    return tau if found is None else found


def start() -> float:
    """The threshold before the first round."""
    return settings().tau


_TYPES: Final[Mapping[str, Any]] = {
    "drafts": list[DraftedToken],
    "routed": list[RoutedToken],
    "settled": list[FallbackToken],
    "report": RoundReport,
    "local": list[LocalThreshold],
    "tau": float,
}


def read(kind: str, path: str) -> Any:
    """Read a step's file: drafts, routed, settled, report, local or tau."""
    return msgspec.json.decode(Path(path).read_bytes(), type=_TYPES[kind])


def write(found: object, path: str) -> None:
    """Write a step's file."""
    Path(path).write_bytes(msgspec.json.encode(found))
