"""The demo's recordings, decided again: nothing differs today, and what is changed on purpose is found and named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cloud_verifier import service as cloud_service
from cloud_verifier import verdicts
from cloud_verifier.service import CloudService
from edge_agent import gate, generation, journal
from edge_agent.events import Observation
from edge_broker.relay import Relay
from edge_broker.service import EdgeService
from fedhlm.config import presets
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.errors import TraceError
from fedhlm.learning.curve import Bins, Curve
from fedhlm.learning.federation import Members
from fedhlm.learning.thresholds import tau_of_budget
from fedhlm.protocol.messages import Note, RoutedVerdict, Verdict, VerdictBatch
from fedhlm_traces.check.agent import check_agent
from fedhlm_traces.check.divergence import Divergence
from fedhlm_traces.check.journals import PartJournal, lives
from fedhlm_traces.check.run import Which, check_file
from fedhlm_traces.file import read

GOLDEN = Path(__file__).parents[1] / "golden"


def agents_of(preset: str) -> list[PartJournal]:
    trace = read(GOLDEN / f"{preset}.trace")
    return [life for life in lives(trace, trace.header.root) if life.part == "agent"]


def differing(preset: str) -> list[Divergence]:
    return [d for life in agents_of(preset) for d in check_agent(life).divergences]


def test_every_preset_has_a_recording_and_nothing_else() -> None:
    assert sorted(p.stem for p in GOLDEN.glob("*.trace")) == sorted(presets())


@pytest.mark.parametrize("preset", presets())
def test_nothing_is_decided_otherwise_today(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = check_file(GOLDEN / f"{preset}.trace", "all")
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "all the same" in printed
    for life in agents_of(preset):
        assert life.whole, life.complaint
        assert {note.kind for note in life.notes} >= {"state", "began", "plan", "committed", "ended"}


@pytest.mark.parametrize("preset", ["budget", "fedhlm"])
def test_the_learning_recordings_have_learnt_a_threshold(preset: str) -> None:
    """Else the tests below could not see a change of how it is learnt."""
    plans = [n.data for life in agents_of(preset) for n in life.notes if n.kind == "plan"]
    taus = {journal.unpack(data, journal.Planned).tau for data in plans}
    assert len(taus) > 2
    assert max(taus) > 0.2


# Changes on purpose


def a_looser_bound(patch: pytest.MonkeyPatch) -> None:
    def looser(evidence: Curve, m: Bins, allowed: float, delta: float) -> float:
        return tau_of_budget(evidence, m, 1.5 * allowed, delta)

    patch.setattr("edge_agent.policy.tau_of_budget", looser)


def at_least_instead_of_above(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(gate.GATES, "threshold", lambda s: lambda u, _position: u > 0.9 * s.threshold)


def half_the_harm(patch: pytest.MonkeyPatch) -> None:
    add = Curve.add

    def halved(self: Curve, score: float, harm: float, weight: float = 1.0) -> None:
        add(self, score, 0.5 * harm, weight)

    patch.setattr(Curve, "add", halved)


def a_doubt_too_high(patch: pytest.MonkeyPatch) -> None:
    score = generation.scored

    def doubting(*given: Any, **named: Any) -> Observation:
        seen = score(*given, **named)
        return seen._replace(uncertainty=min(1.0, seen.uncertainty + 0.1))

    patch.setattr(generation, "scored", doubting)


@pytest.mark.parametrize(
    ("change", "preset", "word"),
    [
        (a_looser_bound, "budget", "tau was"),
        (half_the_harm, "budget", "tau was"),
        (a_doubt_too_high, "budget", "tau was"),
        (at_least_instead_of_above, "u-hlm", "the rule is another"),
        (at_least_instead_of_above, "fedhlm", "the rule is another"),
    ],
)
def test_a_changed_threshold_rule_is_found_and_named(
    change: Callable[[pytest.MonkeyPatch], None], preset: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    found = differing(preset)
    assert found
    assert any(word in d.why for d in found)
    token = next(d for d in found if "token " in d.where)
    assert "u " in token.recorded
    assert "u " in token.now
    assert token.recorded != token.now


def test_a_changed_acceptance_is_found_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = COUPLINGS["gumbel"]

    def credulous(logits: object, sampling: object, position: int, draft: int | None, law: bytes) -> int:
        return honest.settle(logits, sampling, position, draft, law) if draft is None else draft  # type: ignore[arg-type]

    monkeypatch.setitem(COUPLINGS, "gumbel", honest._replace(settle=credulous))
    assert check_file(GOLDEN / "exact.trace", "cloud") == 1
    printed = capsys.readouterr().out
    assert "then" in printed
    assert "stand" in printed


# Changes of the parts that decide for all: each is made in the product, and must be found in what it says


def one_less_accepted(patch: pytest.MonkeyPatch) -> None:
    honest = verdicts.verdict_of

    def stingy(*given: Any, **named: Any) -> Verdict | None:
        verdict = honest(*given, **named)
        return verdict and replace(verdict, accepted=max(0, verdict.accepted - 1))

    patch.setattr(cloud_service, "verdict_of", stingy)


def nothing_but_the_count(patch: pytest.MonkeyPatch) -> None:
    honest = verdicts.verdict_of

    def terse(*given: Any, **named: Any) -> Verdict | None:
        verdict = honest(*given, **named)
        return verdict and replace(verdict, target_probs=b"", missed=b"")

    patch.setattr(cloud_service, "verdict_of", terse)


def published_and_not_closed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Members, "close", lambda members, _present=(): members.state())


def closed_and_not_published(patch: pytest.MonkeyPatch) -> None:
    async def silent(self: Any, *_given: Any) -> None:
        return None

    patch.setattr(CloudService, "_send_learned", silent)
    patch.setattr(EdgeService, "_send_learned", silent)


def one_less_accepted_by_the_edge(patch: pytest.MonkeyPatch) -> None:
    honest = EdgeService._verdict

    def stingy(self: EdgeService, *given: Any) -> Verdict:
        verdict = honest(self, *given)
        return replace(verdict, accepted=max(0, verdict.accepted - 1))

    patch.setattr(EdgeService, "_verdict", stingy)


def relayed(change: Callable[[Verdict], Verdict]) -> Callable[[pytest.MonkeyPatch], None]:
    honest = Relay.answers

    def changed(self: Relay, batch: VerdictBatch) -> list[RoutedVerdict]:
        return [RoutedVerdict(a.agent, change(a.verdict)) for a in honest(self, batch)]

    return lambda patch: patch.setattr(Relay, "answers", changed)


PRODUCTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, Which]] = {
    "cloud: accepted - 1": (one_less_accepted, "exact", "cloud"),
    "cloud: no probabilities, nothing missed": (nothing_but_the_count, "budget", "cloud"),
    "cloud: a round published and not closed": (published_and_not_closed, "budget", "cloud"),
    "cloud: a round closed and not published": (closed_and_not_published, "budget", "cloud"),
    "edge: accepted - 1 of its own": (one_less_accepted_by_the_edge, "fedhlm", "edge"),
    "edge: accepted - 1 of the cloud's": (
        relayed(lambda v: replace(v, accepted=max(0, v.accepted - 1))),
        "exact",
        "edge",
    ),
    "edge: no probabilities, nothing missed": (
        relayed(lambda v: replace(v, target_probs=b"", missed=b"")),
        "budget",
        "edge",
    ),
    "edge: a round published and not closed": (published_and_not_closed, "budget", "edge"),
    "edge: a round closed and not published": (closed_and_not_published, "budget", "edge"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_changed_product_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, preset, which = PRODUCTS[name]
    change(monkeypatch)
    assert check_file(GOLDEN / f"{preset}.trace", which) == 1
    assert f"{which}" in capsys.readouterr().out


def test_an_update_takes_the_decisions_of_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = GOLDEN / "budget.trace", tmp_path / "new.trace"
    a_looser_bound(monkeypatch)
    assert check_file(old, "agent", update=new) == 1
    assert check_file(new, "agent") == 0
    monkeypatch.undo()
    assert check_file(new, "agent") == 1
    assert "tau was" in capsys.readouterr().out
    with pytest.raises(TraceError, match="exists"):
        check_file(old, "agent", update=new)


def test_a_recording_without_journals_is_refused(tmp_path: Path) -> None:
    from fedhlm_traces.file import Writer

    trace = read(GOLDEN / "hlm.trace")
    plain = tmp_path / "plain.trace"
    with Writer(plain, trace.header) as writer:
        for record in trace:
            if not record.topic.endswith("/journal"):
                writer.write(record)
    with pytest.raises(TraceError, match=r"telemetry\.journal"):
        check_file(plain)


@pytest.mark.parametrize("lost", [1, 100])
def test_a_life_without_its_beginning_is_passed_over_in_words(lost: int) -> None:
    life = agents_of("u-hlm")[0]
    cut = PartJournal(
        part="agent",
        name=life.name,
        levels=life.levels,
        life=life.life,
        notes=life.notes[lost:],
        number=lost,
        complaint="the recording begins in the middle",
    )
    outcome = check_agent(cut)
    assert outcome.decisions == 0
    assert outcome.skipped == ["the recording begins in the middle"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_first_notes_of_a_life_are_compared_without_the_rest(share: float) -> None:
    life = agents_of("exact")[0]
    notes: list[Note] = life.notes[: int(share * len(life.notes))]
    cut = PartJournal(part="agent", name=life.name, levels=life.levels, life=life.life, notes=notes, complaint="cut")
    outcome = check_agent(cut)
    assert not outcome.divergences
    assert outcome.decisions > 0
