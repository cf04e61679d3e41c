"""The truth of a demo stands beside its certificates: what is counted, over which texts, and where a limit failed."""

import io
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console

from fedhlm.config import load
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.errors import ConfigError
from fedhlm.learning.certificate import Certificate
from fedhlm_fleet.demo.judge import Judge
from fedhlm_fleet.demo.report import Generated
from fedhlm_fleet.demo.run import Demo
from fedhlm_fleet.demo.truth import truth_rows, truth_table
from fedhlm_zoo.shipped import model_folder

CONFIDENCE = 0.95


def text(agent: str, known: Certificate, *, tokens: int = 100, ruled: float = 0.0, **options: Any) -> Generated:
    statistics = {f"risk_{name}": value for name, value in known.figures().items()}
    statistics |= {"risk_limit": known.limit(CONFIDENCE), "risk": known.estimate}
    return Generated(
        agent=agent, task="continue", prompt="p", topic="", seed=1, max_tokens=tokens, finish="length",
        ids=[1] * tokens, sources=["local"] * tokens,
        statistics=statistics | ({"verified_number": ruled} if ruled else {}), **options,
    )  # fmt: skip


def certificates(*texts: tuple[int, int]) -> list[Certificate]:
    """The certificate after each text, of so many tokens and wrong ones."""
    known = Certificate()
    found = []
    for tokens, wrong in texts:
        known.add(tokens, [1.0] * wrong)
        found.append(known.copy())
    return found


def test_the_truth_is_counted_over_the_texts_that_the_certificate_has_and_pooled_like_it() -> None:
    one = certificates((90, 2), (100, 3))
    other = certificates((100, 0))
    requests = [text("a", one[0], ruled=10.0), text("b", other[0]), text("a", one[1]), text("b", other[0])]
    rows = truth_rows(
        [*requests, replace(requests[0], finish=None)],
        [(50, 2), (40, 0), (60, 3), (70, 9), (0, 0)],
        temperature=0.0,
        confidence=CONFIDENCE,
    )
    a, b, both = rows
    assert (a.agent, a.texts, a.tokens, a.kept, a.wrong) == ("a", 2, 190, 110, 5)
    assert (b.texts, b.tokens, b.kept, b.wrong) == (1, 100, 40, 0), "its second text waits for an audit"
    assert (both.agent, both.tokens, both.wrong) == ("all", 290, 5)
    assert a.truth == a.risk == pytest.approx(5 / 190)
    assert a.truth < a.risk_limit
    assert both.risk_limit == (one[1] + other[0]).limit(CONFIDENCE)
    assert not any(row.ever_above for row in rows)


def test_a_limit_that_was_once_below_the_truth_is_seen_even_if_it_recovers() -> None:
    lied = certificates((1_000, 0), (1_000, 0))  # nothing was found where 300 of the first 1,000 were wrong
    requests = [text("a", known, tokens=1_000) for known in lied]
    rows = truth_rows(requests, [(500, 300), (500, 0)], temperature=0.0, confidence=CONFIDENCE)
    assert [row.ever_above for row in rows] == [True, True]
    honest = certificates((1_000, 300), (100_000, 0))
    requests = [text("a", lied[0], tokens=1_000), text("a", honest[1], tokens=100_000)]
    rows = truth_rows(requests, [(500, 300), (500, 0)], temperature=0.0, confidence=CONFIDENCE)
    assert rows[0].truth < rows[0].risk_limit
    assert rows[0].ever_above


def test_temperatures_have_certificates_of_their_own() -> None:
    known = certificates((100, 1))[0]
    requests = [text("a", known), text("a", known, temperature=0.0)]
    rows = truth_rows(requests, [(50, 1), (50, 1)], temperature=0.8, confidence=CONFIDENCE)
    assert [(row.agent, row.temperature, row.texts) for row in rows] == [
        ("a", 0.8, 1),
        ("all", 0.8, 1),
        ("a", 0.0, 1),
        ("all", 0.0, 1),
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(truth_table(rows))
    assert "a, 0.8" in out.getvalue()
    assert "…" not in out.getvalue(), "it fits on a terminal"


def test_the_llm_finds_exactly_the_kept_tokens_that_it_would_not_write() -> None:
    """In the LLM's own text nothing is wrong; a changed token is, where it was kept."""
    generation = load(preset="budget", environ={}).config.generation
    judge = Judge(llm=model_folder("", "llm"), slm=model_folder("", "slm"))
    for temperature in (0.0, 0.8):
        sampling = generation.sampling(3, temperature=temperature)
        prompt = judge._large.encode("Oil prices rise\n")
        ids = judge._large.write(prompt, sampling, 12)
        request = Generated(
            agent="a", task="continue", prompt="Oil prices rise\n", topic="", seed=3, max_tokens=12, finish="length",
            temperature=temperature, ids=ids, sources=["local"] * 6 + ["cloud"] * (len(ids) - 6),
        )  # fmt: skip
        assert COUPLINGS[sampling.coupling].shared
        assert judge.kept_and_wrong(request, generation) == (6, 0)
        last = ids[5] + 1
        assert judge.kept_and_wrong(replace(request, ids=[*ids[:5], last, *ids[6:]]), generation) == (6, 1)
        spoilt = [*ids[:-1], ids[-1] + 1]
        assert judge.kept_and_wrong(replace(request, ids=spoilt), generation) == (6, 0), "the last one was not kept"


@pytest.mark.parametrize("preset", ["exact", "slm-only", "hlm"])
def test_without_a_certificate_there_is_nothing_to_compare(preset: str) -> None:
    with pytest.raises(ConfigError, match="--truth"):
        Demo(preset=preset, prompts=None, tokens=8, seed=0, broker="", duration_s=1.0, truth=True)
