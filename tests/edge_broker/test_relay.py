"""The relay passes on what is current, in order, within its bounds."""

import msgspec
from msgspec.structs import replace

from edge_broker.relay import SESSIONS_MAX, Relay
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import MAX_BATCH_BYTES
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, EscalationBatch, RoutedVerdict, Verdict, VerdictBatch


def escalation(session: int = 1, epoch: int = 0, base: int = 5, ids: bytes = b"ab") -> Escalation:
    return Escalation(
        version=SCHEMA_VERSION,
        sender="a",
        sequence=1,
        sent_ms=0,
        session=session,
        epoch=epoch,
        base=base,
        ids=ids,
        patience_ms=1,
    )


def verdict(session: int = 1, epoch: int = 0) -> Verdict:
    return Verdict(
        version=SCHEMA_VERSION,
        sender="cloud",
        sequence=1,
        sent_ms=0,
        session=session,
        epoch=epoch,
        base=5,
        status="settled",
    )


def test_blocks_leave_in_order_and_in_batches() -> None:
    relay = Relay(batch_max=2)
    for base in (1, 2, 3):
        assert relay.escalate("a", escalation(base=base))
    assert [r.escalation.base for r in relay.take_batch()] == [1, 2]
    assert [r.escalation.base for r in relay.take_batch()] == [3]
    assert relay.take_batch() == ()


def test_a_new_epoch_drops_what_waits_of_the_old_one() -> None:
    relay = Relay()
    relay.escalate("a", escalation(epoch=0))
    relay.escalate("b", escalation(epoch=0))
    relay.escalate("a", escalation(epoch=1))
    assert not relay.escalate("a", escalation(epoch=0))
    assert [(r.agent, r.escalation.epoch) for r in relay.take_batch()] == [("b", 0), ("a", 1)]
    assert (relay.stale_escalations, relay.stale_verdicts, relay.repeated) == (2, 0, 0)


def test_the_end_of_a_session_drops_what_waits_of_it() -> None:
    relay = Relay()
    end = replace(escalation(base=0, ids=b""), extend=0)
    for block in (escalation(base=5), escalation(base=6), escalation(session=2)):
        relay.escalate("a", block)
    relay.escalate("b", escalation())
    relay.escalate("a", end)
    assert [(r.agent, r.escalation) for r in relay.take_batch()] == [
        ("a", escalation(session=2)),
        ("b", escalation()),
        ("a", end),
    ]


def test_a_repeated_block_replaces_its_double() -> None:
    relay = Relay()
    relay.escalate("a", escalation(ids=b"ab"))
    relay.escalate("a", escalation(ids=b"abcd"))
    assert [r.escalation.ids for r in relay.take_batch()] == [b"abcd"]
    assert (relay.stale_escalations, relay.repeated) == (0, 1)


def test_a_block_answered_here_leaves_the_queue_alone_and_is_not_stale() -> None:
    relay = Relay()
    blocks = [escalation(base=base) for base in (1, 2, 3)]
    for block in blocks:
        relay.escalate("a", block)
        relay.escalate("b", block)
    relay.settle("a", blocks[1])
    assert [(r.agent, r.escalation.base) for r in relay.pending] == [("a", 1), ("b", 1), ("b", 2), ("a", 3), ("b", 3)]
    assert relay.stale_escalations == relay.stale_verdicts == relay.repeated == 0


def test_answers_of_old_epochs_are_dropped_and_strangers_pass() -> None:
    relay = Relay()
    relay.escalate("a", escalation(epoch=3))
    batch = VerdictBatch(
        version=SCHEMA_VERSION, sender="cloud", sequence=1, sent_ms=0,
        items=(RoutedVerdict("a", verdict(epoch=2)), RoutedVerdict("a", verdict(epoch=3)), RoutedVerdict("b", verdict(epoch=0))),
    )  # fmt: skip
    assert [(a.agent, a.verdict.epoch) for a in relay.answers(batch)] == [("a", 3), ("b", 0)]


def test_memory_is_bounded() -> None:
    relay = Relay()
    for session in range(SESSIONS_MAX + 10):
        relay.escalate("a", escalation(session=session))
        relay.take_batch()
    assert len(relay._epochs) == SESSIONS_MAX


def test_a_batch_fits_a_message_whatever_one_agent_sends() -> None:
    """The cloud refuses what is too large as a whole, and the blocks of modest agents would go with it."""
    relay = Relay()
    for number, size in enumerate((10, MAX_BATCH_BYTES - 1_200, 10, 2 * MAX_BATCH_BYTES, 10, 10)):
        relay.escalate(f"a{number}", msgspec.structs.replace(escalation(), laws=bytes(size)))
    batches = []
    while batch := relay.take_batch():
        batches.append([routed.agent for routed in batch])
        message = EscalationBatch(version=SCHEMA_VERSION, sender="e", sequence=1, sent_ms=0, items=batch)
        if len(batch) > 1:
            assert len(encode(message)) <= MAX_BATCH_BYTES
    assert batches == [["a0", "a1"], ["a2"], ["a3"], ["a4", "a5"]]
