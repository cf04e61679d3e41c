"""A small experiment on toy models: what the shipped one does, in seconds."""

from pathlib import Path

import numpy as np
from msgspec.structs import replace

from fedhlm_lab.papers.device import LawTexts
from fedhlm_lab.papers.experiment import FedhlmExperiment, LabSample
from fedhlm_lab.papers.laws import LawPrompt, Laws, ToyLaws
from fedhlm_lab.papers.pair import LabPair
from fedhlm_lab.papers.requests import LabSource
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.pace import CallPace, CallTally, ModelPace, Paces
from fedhlm_lab.sim.world import Pair
from fedhlm_zoo.corpus import Article

AGREEMENT = 0.9
FINGERPRINTS = (toy.FINGERPRINT, toy.FINGERPRINT)


def word(token: int) -> str:
    """The text of a token."""
    return toy.ToyTokenizer().decode([token])


def laws(cache: Path, prompts: int = 40, rows: int = 1) -> Laws:
    """Laws after random prompts."""
    rng = np.random.default_rng(0)
    ids = [tuple(int(i) for i in rng.integers(1, toy.VOCAB_SIZE, 3 + rows)) for _ in range(prompts)]
    return Laws.load_or_compute(cache, [LawPrompt(one, rows) for one in ids], ToyLaws(AGREEMENT), ToyLaws())


def source(known: Laws) -> LabSource:
    """Articles whose topic is the LLM's likeliest token; of every fifth another one, so that the LLM errs."""
    likeliest = [int(np.argmax(row)) for row in known.large]
    topics = [word(token if number % 5 else token - 1 or 2) for number, token in enumerate(likeliest)]
    return LabSource("toy texts", [Article("", "", topic) for topic in topics])


def texts(known: Laws) -> LawTexts:
    """The laws as texts of requests."""
    return LawTexts(known, [a.topic for a in source(known).articles], word)


def pair() -> LabPair:
    """The toy models."""

    def fleet(*, paces: Paces | None = None, tally: CallTally | None = None, batches: CallPace | None = None) -> Pair:
        made = toy.pair(AGREEMENT)
        return (
            made
            if tally is None
            else made._replace(engine=lambda: tally.paced(toy.engine(step_s=0.0), batches or ModelPace(0.02)))
        )

    return LabPair(ToyLaws(AGREEMENT), ToyLaws(), FINGERPRINTS, word, fleet)


def experiment(**changes: object) -> FedhlmExperiment:
    """FedHLM's experiment, smaller."""
    small = {
        "articles": 40,
        "requests": 160,
        "clients": 4,
        "clusters": 2,
        "rounds": 4,
        "sample": 6,
        "seeds": 2,
        **changes,
    }
    return replace(FedhlmExperiment.load("fedhlm", LabSample(parameters=small)), paper=())
