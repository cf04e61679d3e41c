"""A true text of either source passes, and every wrong token, source or text in it is found."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedhlm.config import load
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.sampling import Logits
from fedhlm.protocol.messages import Sampling
from fedhlm_fleet.chaos.invariants import HeardToken, RequestStory
from fedhlm_fleet.chaos.oracle import (
    CLOUD,
    CLOUD_REGRET,
    DRAFT,
    Judgement,
    checks_of,
    judge,
    over_budget,
    perturbed,
    regret,
)

VOCABULARY = 40


class Toy:
    """Logits that are a function of the whole context."""

    def __init__(self, salt: int) -> None:
        self._salt = salt

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCABULARY for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def row(self, context: Sequence[int]) -> Logits:
        return np.random.default_rng([self._salt, *context]).normal(0.0, 2.0, VOCABULARY).astype(np.float32)

    def after(self, prompt: Sequence[int], ids: Sequence[int]) -> Sequence[Logits]:
        return [self.row([*prompt, *ids[:n]]) for n in range(len(ids) + 1)]


MODELS = {"llm": Toy(1), "slm": Toy(2)}
CHECKS = {"cloud": CLOUD, "unverified": DRAFT, "local": DRAFT}
BY_SOURCE = {"cloud": MODELS["llm"], "unverified": MODELS["slm"], "local": MODELS["slm"]}


def written(sources: Sequence[str], sampling: Sampling, prompt: str = "a prompt") -> RequestStory:
    """A story in which each token is what its source makes of all before it."""
    context = MODELS["llm"].encode(prompt)
    begin = len(context)
    for source in sources:
        row = BY_SOURCE[source].row(context)
        context.append(COUPLINGS[sampling.coupling].settle(row, sampling, len(context), None, b""))
    ids = context[begin:]
    told = RequestStory(
        request="r", agent="porch", prompt=prompt, sampling=sampling, max_tokens=len(ids), asked_s=0.0, finish="length"
    )
    told.tokens = {p: HeardToken(i, s) for p, (i, s) in enumerate(zip(ids, sources, strict=True))}
    told.length, told.text = len(ids), MODELS["llm"].decode(ids)
    told.statistics = {f"tokens_{s}": float(sources.count(s)) for s in set(sources)}
    return told


def judged(*stories: RequestStory) -> Judgement:
    return judge(stories, MODELS, CHECKS)


samplings = st.builds(
    Sampling,
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.0, 0.3, 0.8, 2.0]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    coupling=st.sampled_from(["gumbel", "greedy"]),
    top_k=st.sampled_from([None, 3]),
    min_p=st.sampled_from([None, 0.2]),
)
some_sources = st.lists(st.sampled_from(["cloud", "unverified", "local"]), min_size=1, max_size=8)


@given(sampling=samplings, sources=some_sources)
def test_a_true_text_passes_and_is_judged_whole(sampling: Sampling, sources: list[str]) -> None:
    judgement = judged(written(sources, sampling))
    assert judgement.violations == []
    assert sum(judgement.tokens.values()) == len(sources)
    assert judgement.unjudged == 0


@given(sampling=samplings, position=st.integers(0, VOCABULARY), token=st.integers(0, VOCABULARY - 1))
def test_the_regret_of_a_token_is_zero_only_for_the_one_that_the_coupling_settles(
    sampling: Sampling, position: int, token: int
) -> None:
    row = MODELS["llm"].row([position])
    settled = COUPLINGS[sampling.coupling].settle(row, sampling, position, None, b"")
    assert regret(row, sampling, position, settled) == 0.0
    assert token == settled or regret(row, sampling, position, token) > 0.0


@given(sampling=samplings, sources=some_sources, data=st.data())
def test_a_wrong_token_is_found(sampling: Sampling, sources: list[str], data: st.DataObject) -> None:
    story = written(sources, sampling)
    at = data.draw(st.integers(0, len(sources) - 1))
    token = data.draw(st.integers(0, VOCABULARY - 1))
    assume(token != story.tokens[at].token)
    story.tokens[at] = HeardToken(token, sources[at])
    found = judged(story).violations
    # A wrong token that is nearly as good is rounding's right, but then the text does not fit.
    assert {v.rule for v in found} & {"oracle", "draft", "text"}
    behind = regret(BY_SOURCE[sources[at]].row(_context(story, at)), sampling, len(_context(story, at)), token)
    if sources[at] == "cloud" and behind > CLOUD_REGRET:
        assert any(v.rule == "oracle" and f"position {at}:" in v.text for v in found)


def _context(story: RequestStory, at: int) -> list[int]:
    return MODELS["llm"].encode(story.prompt) + [story.tokens[p].token for p in range(at)]


@pytest.mark.parametrize(("said", "was", "rule"), [("cloud", "unverified", "oracle"), ("unverified", "cloud", "draft")])
def test_a_wrong_source_is_found(said: str, was: str, rule: str) -> None:
    story = written([was] * 8, Sampling(5))
    story.tokens = {p: HeardToken(h.token, said) for p, h in story.tokens.items()}
    assert {v.rule for v in judged(story).violations} == {rule}


def test_a_source_that_the_preset_does_not_know_is_found() -> None:
    story = written(["cloud"] * 3, Sampling(5))
    story.tokens[1] = HeardToken(story.tokens[1].token, "peer")
    assert {v.rule for v in judged(story).violations} == {"source"}


def test_sources_of_which_nothing_can_be_said_are_counted_only() -> None:
    story = written(["cloud", "local", "cloud"], Sampling(5))
    story.tokens[1] = HeardToken((story.tokens[1].token + 1) % VOCABULARY, "local")
    judgement = judge([story], MODELS, {"cloud": CLOUD, "local": None})
    assert judgement.unjudged == 1


@pytest.mark.parametrize(
    ("preset", "sources"),
    [
        ("exact", {"cloud": CLOUD, "unverified": DRAFT}),
        ("hlm", {"cloud": None, "unverified": None}),
        ("budget", {"cloud": CLOUD, "unverified": None, "local": None, "peer": None, "neighbour": None}),
        ("slm-only", {"cloud": CLOUD, "unverified": DRAFT, "local": DRAFT, "peer": None, "neighbour": None}),
    ],
)
def test_what_each_preset_promises(preset: str, sources: dict[str, object]) -> None:
    assert checks_of(load(environ={}, preset=preset).config.generation) == sources


def test_another_text_is_found() -> None:
    story = written(["cloud"] * 3, Sampling(5))
    story.text += "!"
    assert {v.rule for v in judged(story).violations} == {"text"}


@given(sampling=samplings, data=st.data())
def test_behind_a_hole_the_cloud_is_judged_where_all_was_the_clouds(sampling: Sampling, data: st.DataObject) -> None:
    story = written(["cloud"] * 6, sampling)
    lost = data.draw(st.sets(st.integers(0, 4), min_size=1))
    for position in lost:
        del story.tokens[position]
    story.torn = True
    judgement = judged(story)
    assert judgement.violations == []
    assert judgement.tokens == {"cloud": 6 - len(lost)}
    row = MODELS["llm"].row(_true_context(sampling, 5))
    story.tokens[5] = HeardToken(int(np.argmin(perturbed(row, sampling, len(_true_context(sampling, 5))))), "cloud")
    assert {v.rule for v in judged(story).violations} == {"oracle"}


def _true_context(sampling: Sampling, count: int) -> list[int]:
    return _context(written(["cloud"] * 6, sampling), count)


def test_behind_a_hole_of_unknown_tokens_nothing_is_judged() -> None:
    story = written(["cloud", "unverified", "cloud", "cloud"], Sampling(5))
    del story.tokens[1]
    story.torn = True
    judgement = judged(story)
    assert judgement.violations == []
    assert judgement.tokens == {"cloud": 1}
    assert judgement.unjudged == 2


def test_kept_tokens_that_the_llm_would_not_have_written_are_counted_against_the_budget() -> None:
    sampling = Sampling(3, coupling="gumbel")
    story = written(["local"] * 30 + ["unverified"] * 10 + ["cloud"] * 20, sampling)
    found = judge([story], MODELS, CHECKS)
    wrong, tokens = found.errors["porch"]
    context, expected = MODELS["llm"].encode(story.prompt), 0
    for place in range(30):
        row = MODELS["llm"].row(context)
        expected += regret(row, sampling, len(context), story.tokens[place].token) > CLOUD_REGRET
        context.append(story.tokens[place].token)
    assert (wrong, tokens) == (expected, 60)
    assert expected > 20, "two unrelated models seldom agree"
    assert [broken.rule for broken in over_budget(found, 0.05)] == ["budget"]
    assert over_budget(found, 0.9) == []
