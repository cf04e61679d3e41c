"""An answer says nothing of what lies before its block: that block may have been lost, or be under way still."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.events import Answered
from fedhlm_lab.sim import toy
from tests.edge_agent.machine import Bench, plan


def drafted(seed: int, *, blocks: int = 4, agreement: float = 0.6) -> Bench:
    """A machine with so many blocks of one draft on their way, or fewer where the text ends."""
    bench = Bench(plan("async", seed=seed, block=1), [5, 9], agreement=agreement)
    while len(bench.up) < blocks and bench.draft():
        pass
    return bench


@given(seed=st.integers(0, 10_000), lost=st.integers(0, 2))
@settings(max_examples=200)
def test_a_verdict_behind_a_lost_block_confirms_nothing_before_it(seed: int, lost: int) -> None:
    """The cloud goes on from its own next token, whose verdict was lost, and not from the draft in the lost block."""
    bench = drafted(seed)
    for _ in range(lost + 1):
        bench.settle()
    bench.down.pop()  # the verdict, and with it the token that the cloud added
    if bench.up:
        bench.up.pop(0)  # the draft that would have been held against it
    while bench.settle():
        pass
    while bench.hear():
        pass
    bench.run()
    assert bench.ids == toy.large_alone(bench.prompt, bench.plan.sampling, bench.plan.max_tokens)


def peers(bench: Bench, index: int) -> Answered:
    """The edge settles a block from what peers know."""
    block = bench.up[index]
    return Answered(block.epoch, block.base, len(block.ids), [], [], "peer")


def test_peers_that_answer_early_settle_nothing_but_their_own_block() -> None:
    for seed in range(50):
        bench = drafted(seed, agreement=1.0)  # the cloud agrees with every draft
        early = peers(bench, 1)
        bench.handle(early)
        assert bench.committed == [], "the block before is open"
        bench.up.pop(1)
        bench.settle()
        bench.hear()
        sources = [c.source for c in bench.committed]
        assert sources[0] == "cloud"
        assert sources.count("peer") <= len(bench.sent[1].ids)
        bench.run()
        assert bench.ids == toy.large_alone(bench.prompt, bench.plan.sampling, bench.plan.max_tokens)


def test_peers_answer_is_forgotten_with_the_drafts_that_it_was_about() -> None:
    forgotten = 0
    for seed in range(50):
        bench = drafted(seed, agreement=0.0)
        if len(bench.up) < 2:
            continue  # the first draft ends the text
        bench.handle(peers(bench, 1))
        bench.up.pop(1)
        bench.settle()
        bench.hear()
        if bench.machine.tally.rollbacks:
            forgotten += 1
            assert "peer" not in {c.source for c in bench.committed}
    assert forgotten > 25
