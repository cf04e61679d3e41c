"""The entries that an agent adds to its journal beside the bus traffic: facts, events and decisions."""

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
    LinkDown,
    LinkUp,
    Refused,
    Tick,
    Unprimed,
    Working,
)
from edge_agent.result import Job
from fedhlm.bus.party import Party
from fedhlm.errors import ProtocolError
from fedhlm.protocol.fields import FinishReason, Kind
from fedhlm.protocol.messages import Fingerprint, Sampling
from fedhlm.settings import Consensus, Federation, Generation

_EVENTS: Final[dict[str, Any]] = {
    kind.__name__: msgspec.msgpack.Decoder(kind)
    for kind in (Drafted, Grown, Answered, Unprimed, Working, Refused, LinkUp, LinkDown, Cancelled, Tick)
}


class AgentStart(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an agent at start (note "state"): its settings and its learner's snapshot, which may be empty."""

    name: str
    cluster: str
    root: str
    fingerprint: Fingerprint
    federation: Federation
    consensus: Consensus
    space: str
    learner: bytes = b""


class Began(msgspec.Struct, frozen=True, kw_only=True):
    """The start of a generation (note "began"): all inputs of its plan except what the agent has learnt."""

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
        """The job of the generation."""
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
    """Encode the data of a note."""
    return msgspec.msgpack.encode(fact)


def unpack(data: bytes, kind: Any) -> Any:
    """Decode the data of a note; the inverse of `pack`.

    Raises:
        ProtocolError: the data is of another kind, or of another version of the settings.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"note of {len(data)} bytes cannot be decoded: {exc}") from exc


def unpack_event(name: str, data: bytes) -> Event:
    """Decode the event of a "fed" note, whose subject is `name`.

    Raises:
        ProtocolError: the event is unknown, or the data does not match it.
    """
    if name not in _EVENTS:
        raise ProtocolError(f"event must be one of {', '.join(sorted(_EVENTS))} (got {name!r})")
    try:
        event: Event = _EVENTS[name].decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"note of {len(data)} bytes cannot be decoded as event {name}: {exc}") from exc
    return event


class Notes:
    """Writes the journal of an agent. Every method does nothing if its party keeps no journal."""

    def __init__(self, party: Party) -> None:
        self._party = party

    def start(self, fact: Callable[[], AgentStart]) -> None:
        """Write the first note, the agent's state."""
        if self._party.journal is not None:
            self._party.journal.note("state", "agent", pack(fact()))

    def began(self, session: int, job: Job, prompt: list[int], *, link_up: bool, now_s: float) -> None:
        """Note that a generation begins."""
        if self._party.journal is not None:
            protocol = self._party.bus.protocol or "5"
            fact = Began(session=session, protocol=protocol, link_up=link_up, prompt=list(prompt), **job._asdict())
            self._party.journal.note("began", str(session), pack(fact), at_s=now_s)

    def write(
        self, kind: Kind, fact: Planned | Ended | Judged | list[Committed] | Event, at_s: float | None = None
    ) -> None:
        """Write any other note."""
        if self._party.journal is not None:
            self._party.journal.note(kind, type(fact).__name__, pack(fact), at_s=at_s)
