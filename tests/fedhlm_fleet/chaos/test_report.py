"""The report adds up what happened, and passes only without a violation."""

import msgspec

from fedhlm.protocol.messages import Sampling
from fedhlm_fleet.chaos.invariants import BrokenInvariant, HeardToken, RequestStory
from fedhlm_fleet.chaos.oracle import Judgement
from fedhlm_fleet.chaos.parts import MemoryUse
from fedhlm_fleet.chaos.report import ChaosReport, Recovered, Recovery


def report(*violations: BrokenInvariant) -> ChaosReport:
    stories = [RequestStory("r0", "a", "p", Sampling(1), 2, 0.0), RequestStory("r1", "a", "p", Sampling(1), 2, 0.0)]
    stories[0].tokens = {0: HeardToken(5, "cloud"), 1: HeardToken(6, "unverified")}
    stories[0].finish, stories[0].duplicates = "length", 3
    stories[1].tokens, stories[1].torn, stories[1].given_up = {1: HeardToken(6, "cloud")}, True, "a fault"
    return ChaosReport.of(
        options={"seed": 3},
        stories=stories,
        recoveries=[Recovery("kill cloud", 1.0, 2.0), Recovery("cut edge", 9.0, 9.5), Recovery("kill cloud", 3.0, 6.0)],
        judgement=Judgement(
            tokens={"cloud": 1, "unverified": 1},
            unjudged=1,
            ties=1,
            regrets={"oracle": 0.001},
            errors={"a": (2, 90)},
        ),
        memory={"cloud": MemoryUse(400_000_000, 7_000_000, 61.0), "edge-1": MemoryUse(48_000_000, None, 3.0)},
        violations=violations,
        wall_s=12.0,
        strangers=0,
    )


def test_figures_are_sums_over_stories_and_faults() -> None:
    told = report()
    assert told.faults == {"cut edge": Recovered(1, 9.0, 9.0, 9.5, 9.5), "kill cloud": Recovered(2, 2.0, 3.0, 4.0, 6.0)}
    assert (told.requests, told.answered, told.asked_again, told.torn, told.duplicates) == (2, 1, 1, 1, 3)
    assert told.tokens == {"cloud": 2, "unverified": 1}
    assert told.passed
    assert msgspec.json.decode(msgspec.json.encode(told))["memory"]["cloud"] == [400_000_000, 7_000_000, 61.0]


def test_every_violation_is_shown_and_fails_the_run() -> None:
    told = report(BrokenInvariant("oracle", "a r0", "position 0"), BrokenInvariant("log", "cloud", "Traceback"))
    assert not told.passed
    shown = "\n".join(told.lines())
    assert "violations: 2" in shown
    assert "oracle: a r0: position 0" in shown
    assert "log: cloud: Traceback" in shown
    assert "cloud 400 (+7 in 61 s), edge-1 48" in shown
    assert "kept tokens that the LLM would not have written: a 2 of 90" in shown
