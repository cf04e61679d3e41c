"""A device on cached laws decides as a live one: gate, coupling, verdict, audit and what is learnt."""

from pathlib import Path

import numpy as np
import pytest

from edge_agent.learner import Learner
from edge_agent.measures import measures_of
from fedhlm.config import load
from fedhlm.decoding.couplings import rejection_probability
from fedhlm.decoding.sampling import law
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.papers.device import LawDevice, LawTexts
from fedhlm_lab.papers.requests import asked
from fedhlm_lab.papers.rerun import frozen, rerun
from tests.fedhlm_lab.papers import toys


def device(cache: Path, preset: str, **flags: str) -> LawDevice:
    config = load(preset=preset, environ={}, flags={"generation.peers": "none", **flags}).config
    return LawDevice(
        "one", config.generation, Learner(config.federation, np.random.default_rng(0)), toys.texts(toys.laws(cache))
    )


def test_a_fixed_threshold_sends_exactly_what_is_above_it(tmp_path: Path) -> None:
    one = device(tmp_path, "u-hlm", **{"generation.tau": "0.6"})
    made = [one.answer(r) for r in asked(200, 40, 1)]
    assert {m.source for m in made} == {"local", "cloud"}
    assert all((m.source == "cloud") == (m.doubt > 0.6) for m in made)
    assert all(m.agrees for m in made if m.source == "cloud")
    assert not all(m.agrees for m in made)


def test_beta_is_that_of_both_laws(tmp_path: Path) -> None:
    one = device(tmp_path, "fedhlm", **{"generation.gate": "always"})
    known, texts = toys.laws(tmp_path), toys.texts(toys.laws(tmp_path))
    for request in asked(20, 20, 1):
        sampling = Sampling(request.seed, 0.0, 1.0, "greedy")
        drawn = texts.draw(request.article, sampling, "k-sample")
        target = float(law(known.large[request.article], sampling)[drawn.token])
        assert one.answer(request).beta == pytest.approx(rejection_probability(drawn.prob, target), abs=0.01)


def test_drafts_are_remembered_and_their_laws_only_on_demand(tmp_path: Path) -> None:
    known = toys.laws(tmp_path)
    topics = [a.topic for a in toys.source(known).articles]
    for coupling, keep, same in (("full", True, True), ("full", False, False), ("gumbel", False, True)):
        texts, sampling = LawTexts(known, topics, toys.word, keep_laws=keep), Sampling(7, 1.0, 1.0, coupling)
        first, again = (texts.draw(3, sampling, "k-sample") for _ in range(2))
        assert first == again
        assert (first is again) is same


def test_a_kept_token_is_scored_by_an_audit_only(tmp_path: Path) -> None:
    quiet = device(tmp_path, "slm-only")
    assert all(quiet.answer(r).beta is None for r in asked(40, 40, 1))
    flags = {"generation.threshold": "fixed", "generation.tau": "1", "generation.audit": "1"}
    told: list[bool] = []
    loud = device(tmp_path, "budget", **flags)
    loud._saw = lambda _verdict, _added, audit: told.append(audit)
    made = [loud.answer(r) for r in asked(40, 40, 1)]
    assert all(m.source == "local" and m.audited and m.beta is not None for m in made)
    assert told == [True] * 40
    known = loud.learner.certificate(
        measures_of(loud.config, Sampling(0, 0.0, 1.0, "gumbel"), loud.learner.pair), loud.config
    )
    assert known is not None
    assert known.estimate == pytest.approx(np.mean([not m.agrees for m in made]))


def test_the_simulator_decides_the_same(tmp_path: Path) -> None:
    policies = {
        "threshold": frozen("u-hlm", {"generation.tau": "0.4"}),
        "coin": frozen("rand-hlm", {}),
        "blocks": frozen("speculative", {}),
        "budget": frozen("budget", {}, 0.5),
    }
    rows = rerun(policies, toys.pair().fleet(), toys.texts(toys.laws(tmp_path)), asked(24, 40, 1))
    assert [(row.requests, row.same) for row in rows] == [(24, 24)] * 4


def test_the_comparison_with_the_simulator_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = toys.texts(toys.laws(tmp_path))
    monkeypatch.setattr(texts, "row", lambda article: (article + 1) % 40)
    (row,) = rerun(
        {"threshold": frozen("u-hlm", {"generation.tau": "0.4"})}, toys.pair().fleet(), texts, asked(12, 40, 1)
    )
    assert row.same < row.requests
