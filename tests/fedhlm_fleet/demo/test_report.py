"""The demo's figures, its table and its live lines, from requests made by hand."""

import io
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from fedhlm.bus.party import Stamp
from fedhlm.config import load, presets
from fedhlm.errors import ProtocolError
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.curve import Curve
from fedhlm.protocol.messages import Evidence, Learned, PaperThreshold
from fedhlm_fleet.demo import story
from fedhlm_fleet.demo.journey import BARS, Journey, sparkline
from fedhlm_fleet.demo.progress import Progress
from fedhlm_fleet.demo.report import (
    SOURCES,
    Accuracy,
    Alternatives,
    Figures,
    Generated,
    PresetRun,
    Report,
    figures,
    notes,
    tables,
)

MEASURE = "closed-form/gumbel/sampled"
SENT = {"uplink_bytes": 30.0, "uplink_messages": 1.0, "cluster_bytes": 10.0}


def request(
    task: str, ids: list[int], text: str, sources: list[str], agent: str = "a", **statistics: float
) -> Generated:
    return Generated(
        agent=agent, task=task, prompt="p", topic="World", seed=1, max_tokens=4, ids=ids, text=text,
        sources=sources, finish="length", statistics={**SENT, **statistics},
    )  # fmt: skip


def run_of(requests: list[Generated], preset: str = "budget", wall_s: float = 2.0) -> PresetRun:
    return PresetRun(preset, load(preset=preset, environ={}).config.generation, 1, requests, wall_s)


REQUESTS = [
    request("continue", [1, 2, 3], "abc", ["cloud", "peer", "unverified"]),
    request("topic", [9], " World", ["cloud"]),
    Generated(agent="a", task="continue", prompt="p", topic="", seed=2, max_tokens=4),
]
ALONE = {0: Alternatives([1, 2, 4], "abd", ""), 1: Alternatives([8], " Sports", " World")}


def test_figures_count_what_happened() -> None:
    result = figures(run_of(REQUESTS), ALONE)
    assert (result.requests, result.tokens, result.compared, result.mismatches) == (2, 4, 2, 2)
    assert result.identical_to_llm == 0.5
    assert result.exact_match == 0.0
    assert result.tokens_by_source == {"local": 0, "peer": 1, "neighbour": 0, "cloud": 2, "unverified": 1}
    assert (result.topic_accuracy.slm, result.topic_accuracy.system, result.topic_accuracy.llm) == (1.0, 1.0, 0.0)
    assert (result.uplink_bytes_per_token, result.cluster_bytes_per_token) == (15.0, 5.0)
    assert result.uplink_messages_per_token == 0.5
    assert result.transmissions_saved == 0.5
    assert result.tokens_per_second == 2.0
    assert result.round_trips_per_token == 0.0


def test_a_text_is_identical_only_as_a_whole() -> None:
    requests = [request("continue", [1, 2], "ab", ["cloud"] * 2), request("continue", [1], "a", ["cloud"])]
    alone = {0: Alternatives([1, 2], "ab", ""), 1: Alternatives([1, 2], "ab", "")}
    result = figures(run_of(requests), alone)
    assert result.exact_match == 0.5
    assert result.identical_to_llm == 1.0  # every token that there is


def test_texts_that_other_random_numbers_made_are_not_compared_word_by_word() -> None:
    result = figures(run_of(REQUESTS, "hlm"), ALONE)
    assert (result.identical_to_llm, result.exact_match, result.mismatches) == (None, None, 0)
    assert result.topic_accuracy.llm == 0.0


def test_thresholds_are_the_agents_first_and_last_and_0_where_nothing_is_kept() -> None:
    taus = [("a", -1.0), ("b", -1.0), ("a", 0.2), ("b", 0.4), ("a", 0.6)]
    requests = [request("continue", [1], "x", ["cloud"], agent, tau=tau) for agent, tau in taus]
    requests.append(request("topic", [1], "x", ["cloud"], "b", tau=0.9))  # a law of its own
    result = figures(run_of(requests), {})
    assert (result.tau_start, result.tau_end) == (0.0, 0.5)
    assert figures(run_of(requests, "exact"), {}).tau_end is None  # its gate has no threshold


def reported(known: Certificate) -> dict[str, float]:
    """An agent's statistics of its certificate."""
    return {f"risk_{name}": value for name, value in known.figures().items()}


def test_the_error_is_that_of_all_agents_newest_certificates() -> None:
    first, second = Certificate(), Certificate()
    first.add(10, [0.5])
    early = reported(first)
    first.add(10, [], 1, [1.0], probability=0.5)
    second.add(10, [], 3, probability=0.75)
    reports = [("a", early), ("a", reported(first)), ("b", reported(second))]
    requests = [request("continue", [1], "x", ["local"], agent, **statistics) for agent, statistics in reports]
    run = run_of(requests)
    result = figures(run, {})
    limit = (first + second).limit(run.generation.confidence)
    assert (result.risk_limit, result.risk_generations) == (limit, 3)
    assert result.risk == pytest.approx((0.5 + 2.0) / 30)


def test_a_request_that_failed_is_like_nothing() -> None:
    failed = [
        Generated(
            agent="a", task="continue", prompt="p", topic="", seed=n, max_tokens=4, finish="error", error=f"no {n}"
        )
        for n in range(3)
    ]
    alone = {n: Alternatives([], "", "") for n in range(3)}
    result = figures(run_of(failed), alone)
    assert (result.requests, result.failed, result.first_error, result.compared) == (3, 3, "no 0", 0)
    assert (result.identical_to_llm, result.exact_match) == (None, None)
    report = Report(**msgspec.structs.asdict(result))
    told = notes(report)
    assert told[0] == "3 of 3 requests failed, the first of them: no 0"
    printed = io.StringIO()
    Console(width=100, file=printed).print(*tables(report, 100))
    assert "requests failed" in printed.getvalue()
    assert "equal to LLM only" not in printed.getvalue()


def test_nothing_finished_is_no_division_by_zero() -> None:
    result = figures(run_of(REQUESTS[2:], wall_s=0.0), {})
    assert (result.tokens, result.tokens_per_second, result.uplink_bytes_per_token) == (0, 0.0, 0.0)
    assert (result.identical_to_llm, result.transmissions_saved, result.risk, result.tau_end) == (None,) * 4


tokens = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(list(SOURCES))), max_size=8)


@given(st.lists(st.tuples(tokens, tokens, st.sampled_from(["continue", "topic"])), min_size=1, max_size=6))
def test_figures_add_up(drawn: list[tuple[list[tuple[int, str]], list[tuple[int, str]], str]]) -> None:
    requests = [request(kind, [t for t, _ in own], "x", [s for _, s in own]) for own, _, kind in drawn]
    alone = {i: Alternatives([t for t, _ in other], "y", "z") for i, (_, other, _) in enumerate(drawn)}
    result = figures(run_of(requests), alone)
    assert sum(result.tokens_by_source.values()) == result.tokens == sum(len(r.ids) for r in requests)
    if result.tokens:
        assert result.uplink_bytes_per_token * result.tokens == pytest.approx(30.0 * len(requests))
        assert result.identical_to_llm is not None
        assert result.mismatches == round((1.0 - result.identical_to_llm) * result.tokens)
    whole = figures(run_of(requests[:1]), alone), figures(run_of(requests[1:]), {})
    assert whole[0].tokens + whole[1].tokens == result.tokens


def report_of(names: list[str], big: float) -> Report:
    def column(name: str) -> dict[str, Any]:
        fields = {f: getattr(figures(run_of(REQUESTS, "budget"), ALONE), f) for f in Figures.__struct_fields__}
        return {
            **fields,
            "preset": name,
            "uplink_bytes_per_token": big,
            "tokens": 123_456,
            "risk_limit": 1.0,
            "risk": 0.1,
        }

    return Report(**column(names[0]), comparisons=[Figures(**column(name)) for name in names])


def printed_at(width: int, report: Report) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(*tables(report, width))
    for line in notes(report):
        console.print(line)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("name", [*presets(), "my-preset.toml"])
def test_the_table_is_one_in_100_columns_and_whole_in_fewer(name: str) -> None:
    report = report_of([name, *(p for p in ("exact", "fedhlm", "hlm") if p != name)], 8_302.1)
    lines = printed_at(100, report)
    assert lines[1].split() == [name, *(c.preset for c in report.comparisons)]
    assert "upper limit: the certificate" in " ".join(lines)
    for width in (100, 80, 60, 45):
        text = "\n".join(printed_at(width, report))
        assert "…" not in text
        assert text.count("8,302.1") == len(report.comparisons) + 1
        assert text.count("same 2") >= len(report.comparisons)


def test_topics_that_no_model_can_name_are_left_out_of_the_table() -> None:
    """A chat model names none: its 0 % is no figure of the fleet. One right answer of any of them brings the rows."""
    report = report_of(["exact", "hlm"], 1.0)
    assert any("topic accuracy" in line for line in printed_at(100, report))
    nobody = Accuracy(slm=0.0, system=0.0, llm=0.0)
    blank = replace(
        report, topic_accuracy=nobody, comparisons=[replace(c, topic_accuracy=nobody) for c in report.comparisons]
    )
    lines = printed_at(100, blank)
    assert not any(word in line for line in lines for word in ("topic accuracy", "SLM only"))
    assert any("uplink messages per token" in line for line in lines)
    one = replace(blank, topic_accuracy=Accuracy(slm=0.0, system=0.0, llm=0.5))
    assert any("topic accuracy" in line for line in printed_at(100, one))


# Live


def learned(curve: Curve | None, *, threshold: float | None = None, number: int = 3) -> Learned:
    update = {} if threshold is None else {"3fa4b1.09c2de": PaperThreshold(threshold, 10)}
    curves = {} if curve is None else {MEASURE: curve.to_bytes()}
    return Learned(**Stamp("edge")(), round=number, members=2, thresholds=update, curves=curves)


def journey(preset: str = "budget") -> Journey:
    return Journey(load(preset=preset, environ={}).config.generation, MEASURE)


def test_the_journey_tells_rounds_threshold_and_budget() -> None:
    told = journey()
    assert told.lines() == ["tokens     none yet", "error      nothing audited yet; budget 0.05 per token"]
    curve = Curve.empty()
    for u, harm in ((0.05, 0.0), (0.4, 0.25), (0.95, 1.0)):
        for _ in range(20):
            curve.add(u, harm)
    known = Certificate()
    for _ in range(200):
        known.add(10, [0.5])
    told.heard(["local", "cloud", "cloud", "peer"])
    told.learned("home", learned(curve))
    told.learned("", learned(None, number=1))
    told.finished(request("continue", [1], "x", ["local"], "a", tau=0.25, **reported(known)))
    limit = known.limit(0.95)
    assert told.lines() == [
        "tokens     4: kept 25.0%, peers 25.0%, cloud 50.0%",
        "federated  round 3 of home, 2 agents, 60 verdicts",
        "federated  round 1 of all, 2 agents",
        "threshold  tau 0.25",
        "peers      settle nothing yet: the cloud has checked too few proposals",
        f"error      at most {limit:.4f} per token (95%, 200 texts), R-hat 0.0500, budget 0.05",
    ]
    assert told.line() == f"4: kept 25.0%, peers 25.0%, cloud 50.0%; tau 0.25; error <= {limit:.4f}"
    told.learned("", learned(curve))
    curves = [line for line in told.lines() if line.startswith("m(u)")]
    assert [line.split()[2:] for line in curves] == [["0.25", "1.00", "1.00"]], "not optimistic between what was seen"


def test_the_journey_tells_the_fleets_certificate() -> None:
    told = journey()
    known = Certificate()
    known.add(20_000, [1.0] * 100)
    evidence = Evidence(1, {"3fa4b1.09c2de": known.to_bytes()})
    told.learned("home", replace(learned(None), evidence=evidence))
    assert not any("fleet" in line for line in told.lines()), "that of one cluster, perhaps"
    told.learned("", replace(learned(None), evidence=evidence))
    assert told.lines()[-1] == f"fleet      at most {known.limit(0.95):.4f}, as the cloud sums it up"
    broken = replace(learned(None), evidence=Evidence(1, {"3fa4b1.09c2de": b"xx"}))
    with pytest.raises(ProtocolError):
        told.learned("", broken)


def test_the_journey_of_the_published_rule_shows_its_threshold() -> None:
    told = journey("fedhlm")
    told.learned("home", learned(None, threshold=0.31))
    assert told.lines()[1] == "federated  round 3 of home, 2 agents, tau 0.310"
    assert journey("hlm").legend() == []


def test_peers_settle_from_the_similarity_that_the_agents_report() -> None:
    told = journey()
    told.finished(request("continue", [1], "x", ["cloud"], "a", tau=-1.0))
    assert any(line.startswith("peers      settle nothing yet") for line in told.lines())
    assert "threshold  tau 0: every draft is verified, since too little is known" in told.lines()
    told.finished(request("continue", [1], "x", ["cloud"], "b", similarity=0.9))
    assert "peers      settle where contexts are similar by 0.90 or more, at 1 of 2 agents" in told.lines()


def test_a_curve_that_is_none_is_refused() -> None:
    broken = Learned(**Stamp("edge")(), round=1, members=1, curves={MEASURE: b"xx"})
    with pytest.raises(ProtocolError):
        journey().learned("home", broken)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=64))
def test_a_sparkline_rises_with_its_values(values: list[float]) -> None:
    bars = [BARS.index(bar) for bar in sparkline(sorted(values))]
    assert bars == sorted(bars)
    assert len(bars) <= 16
    assert sparkline([0.0, 1.0]) == BARS[0] + BARS[-1]


def shown(width: int, *, plain: bool) -> tuple[Progress, Console]:
    console = Console(file=io.StringIO(), width=width, force_terminal=not plain, color_system=None)
    clock = iter(range(0, 1_000, 6))
    return Progress(["a", "b"], journey(), plain=plain, console=console, clock_s=lambda: float(next(clock))), console


def test_only_the_run_moves_the_journey() -> None:
    progress, console = shown(100, plain=True)
    progress.stage("the run", watched=True)
    first = request("continue", [1, 2], "Oil rises", ["local", "cloud"], tau=0.5)
    progress.heard(first)
    progress.finished(first)
    progress.learned("home", learned(None))
    progress.stage("something else")
    progress.learned("barn", learned(None))
    second = request("continue", [1], "x", ["cloud"])
    progress.heard(second)
    progress.finished(second)
    assert progress.journey.tokens.total() == 2
    assert set(progress.journey.rounds) == {"home"}
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a wrote: p | Oil rises" in printed
    assert "tokens 2: kept 50.0%, cloud 50.0%; tau 0.50" in printed
    assert " ".join(printed.split()).count("raised its threshold to tau = 0.50") == 1
    assert "something else" in printed


def test_a_failure_is_told_at_once() -> None:
    progress, console = shown(100, plain=True)
    failed = Generated(
        agent="b", task="topic", prompt="p", topic="", seed=1, max_tokens=1, finish="error", error="no way"
    )
    progress.finished(failed)
    assert console.file.getvalue() == "b failed: no way\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_view_shows_every_agent_s_counts_at_any_width(width: int) -> None:
    progress, console = shown(width, plain=False)
    progress.stage("the run", watched=True)
    text = "a text that goes on [red]and[/red] on " * 9 + "its end"
    progress.heard(
        request("continue", [1] * 90, text, ["local"] * 30 + ["peer"] * 5 + ["neighbour"] * 5 + ["cloud"] * 50)
    )
    with progress.live():
        pass
    printed = re.sub(r"\x1b\[[?0-9;]*\w", "", console.file.getvalue())  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in printed.splitlines()]
    (row,) = {line for line in lines if line.startswith("a ")}
    assert row.split()[:5] == ["a", "30", "5", "5", "50"]
    assert row.endswith("its end")
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_told_line_is_wider_than_the_output(width: int) -> None:
    progress, console = shown(width, plain=True)
    generation = load(preset="budget", environ={}).config.generation
    told = [story.setting(2, 2), *story.task(generation, presets()["budget"]), *progress.journey.legend()]
    progress.stage("The run: all agents write for 30 s under preset budget.", *told, watched=True)
    progress.learned("home", learned(None))
    for source in SOURCES:
        done = request("continue", [1], "word " * 60, [source], "a", tau=0.5, similarity=0.8, **reported(CERTAIN))
        progress.heard(done)
        progress.finished(done)
    progress.tell()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert not any("\x1b" in line for line in lines)
    indented = [line for line in lines if not line[:10].strip()]
    assert len(indented) > len(lines) / 2, "what follows a time stands under it"


# The story

CERTAIN = Certificate()
CERTAIN.add(20_000, [1.0] * 100)


def test_each_beat_of_the_story_is_told_once_when_it_is_true() -> None:
    told = journey()
    heard = story.Narrator(told)
    assert heard.news() == []
    told.learned("home", learned(None))
    assert [line.split(":")[1].strip() for line in heard.news()] == [
        "the first federated round. Only sums travel, no text."
    ]
    told.heard(["cloud", "local"])
    told.finished(request("continue", [1], "x", ["cloud"], "a", tau=-1.0))
    assert heard.news() == [], "a threshold of 0 keeps nothing"
    told.finished(request("continue", [1], "x", ["cloud"], "a", tau=0.4, **reported(CERTAIN)))
    assert [line.split(":")[0] for line in heard.news()] == [
        "Enough is known now to keep drafts on the device",
        "The certificate is below the budget for the first time",
    ]
    for source, words in (
        ("peer", "Peers settle"),
        ("neighbour", "The other cluster"),
        ("unverified", "The LLM does not"),
    ):
        told.heard([source])
        (line,) = heard.news()
        assert line.startswith(words)
        told.heard([source])
    assert heard.news() == []


def test_nothing_is_told_of_learning_where_nothing_is_learnt() -> None:
    told = journey("exact")
    heard = story.Narrator(told)
    told.learned("home", learned(None))
    told.finished(request("continue", [1], "x", ["cloud"], "a", tau=0.4))
    assert heard.news() == []
    generation = load(preset="exact", environ={}).config.generation
    assert story.task(generation, "same text") == ["The preset promises: same text."]
    assert story.task(generation, "") == []


def test_the_outcome_says_the_table_s_figures_in_words() -> None:
    report = report_of(["budget", "hlm"], 20.0)
    assert story.outcome(Report(**{**msgspec.structs.asdict(report), "tokens": 0}), 0.95) == []
    own, other = report.comparisons
    lossless = replace(other, uplink_bytes_per_token=8_300.0, identical_to_llm=1.0, uplink_messages_per_token=0.25)
    compared = replace(report, tokens=8, comparisons=[own, lossless], budget=0.05, risk_limit=0.03)
    assert story.outcome(compared, 0.95) == [
        "62% of 8 tokens were settled without the cloud, on the device or among peers.",
        "The agents sent 0.50 messages per token to the cloud: 50% less than one for every token.",
        "For the same requests budget sent 20 bytes per token to the cloud, and hlm 8,300: 415 times as many.",
        "hlm wrote the LLM's own text token for token, with 0.25 messages per token.",
        "Keeping drafts costs an error of at most 3.0% per token, at 95% confidence: within the budget of 5.0%.",
    ]
    above = replace(report, budget=0.05, risk_limit=0.2, comparisons=[])
    assert "not yet within the budget" in story.outcome(above, 0.95)[-1]
