"""The dearest messages that the types allow, by name: each is aimed at a part and made for a size in bytes.

Whoever handles one of them must stay linear in its size; what is far beyond a limit must be refused at little cost.
"""

import random
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from fedhlm.decoding.tree import Branch, pack_branches
from fedhlm.learning.curve import Curve
from fedhlm.peers.context_keys import DIMS
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import MAX_BATCH, MAX_BLOCK, MAX_CONTEXT, MAX_CURVES, MAX_KEY, MAX_PAIRS, MAX_PAYLOAD_BYTES
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    Contribution,
    Escalation,
    EscalationBatch,
    Hints,
    Learned,
    Output,
    PaperThreshold,
    Prime,
    Profile,
    Prompt,
    RoutedEscalation,
    RoutedVerdict,
    Sampling,
    Uncertain,
    UncertainTokens,
    Verdict,
    VerdictBatch,
    Verified,
    VerifiedTokens,
)
from fedhlm.protocol.packing import pack_ids
from fedhlm_lab.sim import toy
from tests.fuzz.mutators import Hostile

SMALL: Final = 64 * 1024
_rng: Final = random.Random(7)


class Heavy(NamedTuple):
    """A part and a message for it of about so many bytes."""

    part: str
    make: Callable[[int], Hostile]


def _header(sender: str) -> dict[str, Any]:
    return {"version": SCHEMA_VERSION, "sender": sender, "sequence": 1, "sent_ms": 10**12}


def _ids(count: int) -> bytes:
    return pack_ids([_rng.randrange(1, toy.VOCAB_SIZE) for _ in range(count)], toy.VOCAB_SIZE)


def block(*, base: int = 1, count: int = 0, session: int = 1, extend: int = 1, **more: Any) -> Escalation:
    """An escalation of `count` drafts with its prime, that a cloud can settle where it fits the model's context."""
    prime = Prime(Sampling(1), toy.FINGERPRINT, _ids(base))
    made = Escalation(
        **_header("a0"),
        session=session,
        epoch=0,
        base=base,
        ids=_ids(count),
        patience_ms=60_000,
        extend=extend,
        before=prime,
    )
    return replace(made, **more)


def _batch(*items: Escalation, agent: str = "a0") -> Hostile:
    message = EscalationBatch(**_header("edge-c0"), items=tuple(RoutedEscalation(agent, item) for item in items))
    return Hostile(topics.CLOUD_VERIFY.name(cluster="c0"), encode(message))


def _to_edge(escalation: Escalation) -> Hostile:
    return Hostile(topics.ESCALATE.name(cluster="c0", agent="a0"), encode(escalation))


def _doubts(size: int, agent: str = "a0") -> Hostile:
    count = min(MAX_BLOCK, size // 80)
    items = tuple(Uncertain(5 + i, 5, 0.5, _rng.randbytes(DIMS)) for i in range(count))
    message = UncertainTokens(**_header(agent), session=1, space="", items=items)
    return Hostile(topics.PEER.name(cluster="c0", agent=agent), encode(message))


def _verified(topic: topics.Topic, cluster: str, size: int) -> Hostile:
    items = tuple(Verified(_rng.randbytes(DIMS), 5) for _ in range(min(MAX_BATCH, size // 70)))
    return Hostile(topic.name(cluster=cluster), encode(VerifiedTokens(**_header("edge"), space="", items=items)))


def _curves() -> dict[str, bytes]:
    made = Curve.empty()
    for i in range(64):
        made.see((i + 0.5) / 64)
        made.add((i + 0.5) / 64, 0.5)
    return {f"{i:<64}": made.to_bytes() for i in range(MAX_CURVES)}


def _learned(_size: int) -> Hostile:
    thresholds = {f"{i:<16}": PaperThreshold(0.5, 1, 1.0, 1) for i in range(MAX_PAIRS)}
    message = Learned(**_header("edge-c0"), round=1, members=1, thresholds=thresholds, curves=_curves())
    return Hostile(topics.FL_STATE.name(cluster="c0"), encode(message))


def _contribution(_size: int) -> Hostile:
    message = Contribution(**_header("a0"), round=1, members=1, curves=_curves())
    return Hostile(topics.FL_UPDATE.name(cluster="c0", agent="a0"), encode(message))


def _profile(_size: int) -> Hostile:
    count = min(4_096, 256 * MAX_KEY // DIMS)
    message = Profile(
        **_header("edge-c0"),
        agent="a0",
        dims=DIMS,
        keys=_rng.randbytes(DIMS * count),
        uncertainties=_rng.randbytes(count),
    )
    return Hostile(topics.CLOUD_PROFILE.name(cluster="c0"), encode(message))


def _verdict(size: int) -> Hostile:
    message = Verdict(
        **_header("edge-c0"),
        session=1,
        epoch=0,
        base=5,
        status="settled",
        accepted=0,
        ids=_ids(min(3 * MAX_CONTEXT, size // 2) // 2),
        target_probs=b"\0\0" * (min(2 * MAX_CONTEXT, size // 2) // 2),
        missed=b"\xff" * min(MAX_CONTEXT // 8, size // 4),
    )
    return Hostile(topics.VERDICT.name(cluster="c0", agent="a0"), encode(message))


def _verdicts(size: int) -> Hostile:
    count = min(MAX_BATCH, size // 40)
    one = Verdict(**_header("cloud"), session=1, epoch=0, base=5, status="settled", accepted=1)
    items = tuple(RoutedVerdict(f"a{i}", replace(one, session=i)) for i in range(count))
    return Hostile(topics.CLOUD_VERDICT.name(cluster="c0"), encode(VerdictBatch(**_header("cloud"), items=items)))


def _prompt(size: int) -> Hostile:
    message = Prompt(**_header("client"), request="heavy", text="a" * min(1_048_576, size), max_tokens=4)
    return Hostile(topics.PROMPT.name(cluster="c0", agent="a0"), encode(message))


def _stops(size: int) -> Hostile:
    message = Prompt(**_header("client"), request="stops", text="abc", max_tokens=4, stop=("xy",) * (size // 3))
    return Hostile(topics.PROMPT.name(cluster="c0", agent="a0"), encode(message))


def _output(size: int) -> Hostile:
    message = Output(
        **_header("a0"), request="r", position=0, ids=(1,) * (size // 2), sources=(), text="a" * (size // 4)
    )
    return Hostile(topics.OUTPUT.name(cluster="c0", agent="a0", client="client"), encode(message))


def _nested(size: int) -> Hostile:
    return Hostile(topics.ESCALATE.name(cluster="c0", agent="a0"), b"\x91" * size)


def _tree(size: int) -> Escalation:
    count = min(MAX_BLOCK, size // 4)
    return block(hints=Hints(None, 1, pack_branches([Branch(i, 5) for i in range(count)], toy.VOCAB_SIZE)))


def _law_bomb(size: int) -> Hostile:
    sampling = Sampling(1, coupling="published-cu")
    one = b"\x01\x00" + _ids(1) + b"\xff"
    count = min(toy.CONTEXT - 4, size // len(one))
    prime = Prime(sampling, toy.FINGERPRINT, _ids(1))
    return _batch(block(count=count, laws=one * count, before=prime))


HEAVY: Final[dict[str, Heavy]] = {
    "nested arrays": Heavy("edge-down", _nested),
    "ids beyond the context": Heavy("cloud", lambda size: _batch(block(count=min(196_000, size // 2)))),
    "prime beyond the context": Heavy("cloud", lambda size: _batch(block(base=min(MAX_CONTEXT, size // 2)))),
    "many blocks": Heavy("cloud", lambda size: _batch(*(block(session=i) for i in range(min(MAX_BATCH, size // 70))))),
    "many extensions": Heavy(
        "cloud",
        lambda size: _batch(*(block(session=i, extend=500) for i in range(min(MAX_BATCH, size // 70)))),
    ),
    "a long extension": Heavy("cloud", lambda _size: _batch(block(extend=65_536))),
    "a full context": Heavy("cloud", lambda _size: _batch(block(count=toy.CONTEXT - 8))),
    "a tree of one path": Heavy("cloud", lambda size: _batch(_tree(size))),
    "laws of one token": Heavy("cloud", _law_bomb),
    "laws that no coupling has": Heavy(
        "cloud", lambda size: _batch(block(count=8, laws=bytes(min(size, MAX_PAYLOAD_BYTES - 1_000))))
    ),
    "a profile": Heavy("cloud", _profile),
    "ids for the edge": Heavy(
        "edge-down", lambda size: _to_edge(block(count=min(196_000, size // 2), hints=Hints(0.0)))
    ),
    "doubts for the edge": Heavy("edge-down", _doubts),
    "doubts that are asked for": Heavy(
        "edge-down", lambda size: _to_edge(block(base=5, count=size // 2, ids=b"\5\0" * (size // 2), hints=Hints(0.0)))
    ),
    "verified tokens for the edge": Heavy("edge-up", lambda size: _verified(topics.NEIGHBOUR, "c1", size)),
    "verdicts for the edge": Heavy("edge-up", _verdicts),
    "a contribution": Heavy("edge-down", _contribution),
    "a state": Heavy("agent", _learned),
    "a verdict": Heavy("agent", _verdict),
    "doubts for an agent": Heavy("agent", lambda size: _doubts(size, "a1")),
    "verified tokens for an agent": Heavy("agent", lambda size: _verified(topics.KNOWN, "c0", size)),
    "a long prompt": Heavy("agent", _prompt),
    "many stop strings": Heavy("agent", _stops),
    "an output": Heavy("agent", _output),
}
