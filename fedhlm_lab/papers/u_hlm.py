"""U-HLM's and CU-HLM's quantities from cached laws: doubt against beta, rates, bytes, and the papers' link model.

Texts are the articles' own, so a kept wrong token does not change the doubts after it. Drafts, laws, doubts and
verdicts are those of the live couplings.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from edge_agent.learner import Learner
from fedhlm.config import load
from fedhlm.decoding.couplings import COUPLINGS, rejection_probability
from fedhlm.decoding.sampling import law
from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.learning.curve import Curve, affine, correlation, isotonic
from fedhlm.learning.thresholds import tau_of_budget
from fedhlm.progress import progress
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.packing import id_bytes
from fedhlm.protocol.sources import SOURCES
from fedhlm_lab.papers.device import LawDevice, LawTexts
from fedhlm_lab.papers.experiment import UhlmExperiment
from fedhlm_lab.papers.laws import Laws
from fedhlm_lab.papers.pair import LabPair
from fedhlm_lab.papers.requests import LabSource, asked
from fedhlm_lab.papers.rerun import RerunRow, rerun

PRONE: Final = 0.43  # U-HLM's published risk-prone threshold, which the presets have
DOUBTS: Final = ("k-sample", "closed-form")
SENT: Final = ("full", "published-cu", "lattice")
DELTA: Final = 0.05  # the calibrated threshold holds with this error probability


class DoubtSeen(NamedTuple):
    """One draft: its doubt, beta, and whether the target's probability of it is below the SLM's."""

    doubt: float
    beta: float
    below: bool


class DoubtFit(NamedTuple):
    """What one form of doubt says of beta.

    `averse` and `prone` are U-HLM's thresholds, at which the line beta = a u + b is 0 and `delta` = P(p(d) < q(d)).
    `calibrated` is the threshold from the learnt curve within the budget.
    """

    form: str
    tokens: int
    correlation: float
    a: float
    b: float
    delta: float
    averse: float
    prone: float
    calibrated: float


class UhlmRuns(NamedTuple):
    """All that was measured with one seed.

    `seen` are the drafts by form of doubt, `law_bytes` the mean bytes of a law by coupling, and `accuracy` is for each
    threshold the share of questions that are answered right and that are sent, with U-HLM. `sizes` are bytes of a law by
    vocabulary and coupling; "gumbel" sends the token alone.
    """

    experiment: UhlmExperiment
    source: str
    seen: dict[str, list[DoubtSeen]]
    fits: dict[str, DoubtFit]
    law_bytes: dict[str, float]
    accuracy: dict[float, tuple[float, float]]
    llm_right: float
    sizes: dict[int, dict[str, int]]
    reruns: Sequence[RerunRow]

    def rate(self, tau: float, form: str = DOUBTS[0]) -> float:
        """The share of drafts above a threshold."""
        return sum(one.doubt > tau for one in self.seen[form]) / len(self.seen[form])

    def error(self, tau: float, form: str = DOUBTS[0]) -> float:
        """The total variation of a step that a threshold costs: E[beta 1{u <= tau}]."""
        return sum(one.beta for one in self.seen[form] if one.doubt <= tau) / len(self.seen[form])


def rate_of(snr_db: float, bandwidth_hz: float) -> float:
    """The link's rate R = W log2(1 + SNR), in bytes a second."""
    return bandwidth_hz * math.log2(1.0 + 10.0 ** (snr_db / 10.0)) / 8.0


def snr_of(rate: float, bandwidth_hz: float) -> float:
    """The signal-to-noise ratio in decibels at which the link has this rate, in bytes a second."""
    return 10.0 * math.log10(2.0 ** (8.0 * rate / bandwidth_hz) - 1.0)


def token_s(rate: float, sent: float, law_bytes: float, *, slm_s: float, llm_s: float) -> float:
    """Seconds a token in the papers' link model: the share `sent` waits for its law's bytes and the LLM.

    It has no cost of a message, no round trip and no downlink.
    """
    return slm_s + sent * (law_bytes / rate + llm_s)


class SpeedupPoint(NamedTuple):
    """Two policies in the link model: bytes of a law without and with compression, and the share that is sent."""

    whole_bytes: float
    sent_bytes: float
    sent: float
    slm_s: float
    llm_s: float

    def at(self, rate: float) -> float:
        """The throughput over that of HLM, which sends every law whole, at a rate in bytes a second."""
        times = {"slm_s": self.slm_s, "llm_s": self.llm_s}
        return token_s(rate, 1.0, self.whole_bytes, **times) / token_s(rate, self.sent, self.sent_bytes, **times)

    @property
    def most(self) -> float:
        """The limit on a link so slow that only bytes count."""
        return self.whole_bytes / (self.sent * self.sent_bytes)

    def rate_for(self, speedup: float) -> float | None:
        """The rate in bytes a second at which the throughput is `speedup` times HLM's; None: at no rate."""
        seconds = speedup * (self.slm_s + self.sent * self.llm_s) - self.slm_s - self.llm_s
        bytes_ = self.whole_bytes - speedup * self.sent * self.sent_bytes
        return bytes_ / seconds if bytes_ > 0.0 and seconds > 0.0 else None


def observed(laws: Laws, temperature: float, seed: int) -> tuple[dict[str, list[DoubtSeen]], dict[str, float]]:
    """Draft at every row. Returns the drafts by form of doubt, and the mean bytes of a law by coupling."""
    seen: dict[str, list[DoubtSeen]] = {form: [] for form in DOUBTS}
    sizes: dict[str, list[int]] = {name: [] for name in SENT}
    with progress("texts read", len(laws.prompts)) as ended:
        for number, prompt in enumerate(laws.prompts):
            sampling = Sampling(seed * 1_000_003 + number, temperature, 1.0, "full")
            for offset in range(prompt.rows):
                row, position = int(laws.first[number]) + offset, len(prompt.ids) - prompt.rows + 1 + offset
                small = laws.small[row]
                token, prob, encoded = COUPLINGS["full"].draft(small, sampling, position)
                target = float(law(laws.large[row], sampling)[token])
                beta = rejection_probability(prob, target)
                for form in DOUBTS:
                    seen[form].append(
                        DoubtSeen(UNCERTAINTIES[form](small, token, sampling, position), beta, target < prob)
                    )
                sizes["full"].append(len(encoded))
                if not offset:
                    for name in SENT[1:]:
                        sizes[name].append(len(COUPLINGS[name].draft(small, sampling, position).law))
            ended()
    return seen, {name: float(np.mean(found)) for name, found in sizes.items()}


def fit_of(form: str, seen: Sequence[DoubtSeen], budget: float) -> DoubtFit:
    """Fit beta to the doubt, and find the thresholds that follow."""
    curve = Curve.empty()
    for one in seen:
        curve.see(one.doubt)
        curve.add(one.doubt, one.beta)
    a, b = affine(curve)
    delta = sum(one.below for one in seen) / len(seen)
    averse, prone = ((level - b) / a if a else math.inf for level in (0.0, delta))
    calibrated = tau_of_budget(curve, isotonic(curve), budget, DELTA)
    return DoubtFit(form, len(seen), correlation(curve), a, b, delta, averse, prone, calibrated)


def sizes_of(vocabularies: Sequence[int], seed: int) -> dict[int, dict[str, int]]:
    """Bytes of one law for each vocabulary, by the live encodings, on laws with normal logits."""
    found = {}
    for size in vocabularies:
        logits = 3.0 * np.random.default_rng(seed).standard_normal(size).astype(np.float32)
        found[size] = {name: len(COUPLINGS[name].draft(logits, Sampling(seed, 1.0), 1).law) for name in SENT}
        found[size]["gumbel"] = id_bytes(size)
    return found


def run(experiment: UhlmExperiment, pair: LabPair, source: LabSource, texts: Laws, questions: Laws) -> UhlmRuns:
    """Run everything with the experiment's first seed, which is that of all drafts and doubts.

    `texts` are for rates and fits, and `questions` about the topics of the source for the accuracy.
    """
    seen, law_bytes = observed(texts, experiment.temperature, experiment.seed)
    fits = {form: fit_of(form, found, experiment.budget) for form, found in seen.items()}
    known = LawTexts(questions, [a.topic for a in source.articles], pair.word, keep_laws=True)
    requests = asked(len(questions.prompts), len(questions.prompts), experiment.seed)
    accuracy = {}
    taus = sorted({*experiment.taus, PRONE})
    with progress("thresholds", len(taus)) as ended:
        for tau in taus:
            config = load(preset="u-hlm", environ={}, flags={"generation.tau": str(tau)}).config
            device = LawDevice("one", config.generation, Learner(config.federation, np.random.default_rng(0)), known)
            made = [device.answer(request) for request in requests]
            accuracy[tau] = (
                sum(m.right for m in made) / len(made),
                sum(SOURCES[m.source].verified for m in made) / len(made),
            )
            ended()
    right = [known.right(r.article, known.target(r.article, Sampling(0, 0.0))) for r in requests]
    policies = {name: load(preset=name, environ={}).config for name in ("hlm", "u-hlm", "cu-hlm")}
    return UhlmRuns(
        experiment,
        source.name,
        seen,
        fits,
        law_bytes,
        accuracy,
        float(np.mean(right)),
        sizes_of(experiment.vocabularies, experiment.seed),
        rerun(policies, pair.fleet(), known, requests[: experiment.sample]),
    )
