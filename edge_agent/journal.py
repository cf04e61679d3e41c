"""What an agent writes in its journal beside the bus's traffic, and how it is read back: facts, events, decisions."""

from collections.abc import Callable
from typing import Any, Final

import msgspec

from edge_agent.events import (
    Answered,
    Cancelled,
    Committed,
    Drafted,
    Event,
    Grown,
    Judged,
    LinkUp,
    Refused,
    Tick,
    Unprimed,
)
from edge_agent.result import Job
from fedhlm.bus.party import Party
from fedhlm.errors import ProtocolError
from fedhlm.protocol.messages import Fingerprint, FinishReason, Kind, Sampling
from fedhlm.settings import Consensus, Federation, Generation

_EVENTS: Final[dict[str, Any]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind)
    for kind in (Drafted, Grown, Answered, Unprimed, Refused, LinkUp, Cancelled, Tick)
}


class AgentStart(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent began (note "state"): what it is made of, and its learner's snapshot (empty: it knew nothing)."""

    name: str
    cluster: str
    root: str
    fingerprint: Fingerprint
    federation: Federation
    consensus: Consensus
    space: str
    learner: bytes = b""


class Began(msgspec.Struct, frozen=True, kw_only=True):
    """A generation begins (note "began"): everything that its plan is made from, besides what the agent has learnt."""

    session: int
    protocol: str
    link_up: bool
    config: Generation
    sampling: Sampling
    max_tokens: int
    context_max: int
    eos_ids: frozenset[int]
    prompt: list[int]

    @property
    def job(self) -> Job:
        """The generation that was asked for."""
        return Job(self.config, self.sampling, self.max_tokens, self.context_max, self.eos_ids)


class Planned(msgspec.Struct, frozen=True, array_like=True):
    """The thresholds of a generation (note "plan")."""

    tau: float
    similarity: float | None


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """Why a generation ended (note "ended")."""

    reason: FinishReason
    error: str


def pack(fact: AgentStart | Began | Planned | Ended | Judged | list[Committed] | Event) -> bytes:
    """The data of a note."""
    return msgspec.msgpack.encode(fact)


def unpack(data: bytes, kind: Any) -> Any:
    """Inverse of `pack`.

    Raises:
        ProtocolError: the data is of another kind or of another version of the settings.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"a note of {len(data)} bytes does not hold what it says: {exc}") from exc


def unpack_event(name: str, data: bytes) -> Event:
    """The event of a "fed" note, whose subject is `name`.

    Raises:
        ProtocolError: an unknown event, or data of another one.
    """
    if name not in _EVENTS:
        raise ProtocolError(f"event must be one of {', '.join(sorted(_EVENTS))} (got {name!r})")
    try:
        event: Event = _EVENTS[name].decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"a note of {len(data)} bytes does not hold the event {name}: {exc}") from exc
    return event


class Notes:
    """The journal of an agent, if its party keeps one; else every method does nothing."""

    def __init__(self, party: Party) -> None:
        self._party = party

    def start(self, fact: Callable[[], AgentStart]) -> None:
        """The first note of all."""
        if self._party.journal is not None:
            self._party.journal.note("state", "agent", pack(fact()))

    def began(self, session: int, job: Job, prompt: list[int], *, link_up: bool, now_s: float) -> None:
        """A generation begins."""
        if self._party.journal is not None:
            protocol = self._party.bus.protocol or "5"
            fact = Began(session=session, protocol=protocol, link_up=link_up, prompt=list(prompt), **job._asdict())
            self._party.journal.note("began", str(session), pack(fact), at_s=now_s)

    def write(
        self, kind: Kind, fact: Planned | Ended | Judged | list[Committed] | Event, at_s: float | None = None
    ) -> None:
        """Anything else."""
        if self._party.journal is not None:
            self._party.journal.note(kind, type(fact).__name__, pack(fact), at_s=at_s)
