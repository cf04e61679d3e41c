"""Every message on the bus: frozen structs in one tagged union, one encoder, one decoder.

Structs travel as msgpack arrays (tag first, fields in order), so field order is part of the protocol and a change
of it raises SCHEMA_VERSION. Token ids and probabilities travel as raw little-endian bytes and are length-checked
before use. A payload that breaks a limit or a type is a ProtocolError; nothing else escapes from `decode`.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta
from msgspec.structs import replace
from numpy.typing import NDArray

from fedhlm.errors import ProtocolError

SCHEMA_VERSION: Final = 3
MAX_PAYLOAD_BYTES: Final = 16 * 1024 * 1024
MAX_CONTEXT: Final = 131_072
MAX_BLOCK: Final = 4_096
MAX_BATCH: Final = 1_024
MAX_DOUBTS: Final = 64
MAX_TEXT: Final = 1_048_576
MAX_TOKENS: Final = 65_536
MAX_KEY: Final = 1_024
MAX_CURVES: Final = 16
MAX_NOTES: Final = 1_024
MAX_STOPS: Final = 16
MAX_REASON: Final = 1_024
MAX_RIDERS: Final = 8

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

# \Z, because $ would let a name end in a newline.
Name = Annotated[str, Meta(max_length=64, pattern=rf"^{NAME_PATTERN}\Z")]
Session = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, lt=2**31)]
Position = Annotated[int, Meta(ge=0, le=MAX_CONTEXT)]
Digest = Annotated[int, Meta(ge=0, lt=2**32)]
TokenId = Annotated[int, Meta(ge=0, lt=2**24)]
Milliseconds = Annotated[int, Meta(ge=0, lt=2**53)]
Ids = Annotated[bytes, Meta(max_length=3 * MAX_CONTEXT)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Reason = Annotated[str, Meta(max_length=MAX_REASON)]
Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Key = Annotated[bytes, Meta(max_length=MAX_KEY)]
Space = Annotated[str, Meta(max_length=16)]
Measure = Annotated[str, Meta(max_length=64)]
Sums = Annotated[bytes, Meta(max_length=4_096)]

Source = Literal["local", "peer", "neighbour", "cloud", "unverified"]
Kind = Literal["state", "began", "heard", "fed", "round", "plan", "judged", "sent", "dropped", "committed", "ended"]
FinishReason = Literal["length", "stop", "error", "cancelled", "context"]
Refusal = Literal["invalid", "taken", "busy", "late"]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every message carries: schema version, who sent it, the sender's running number, when (Unix time, ms)."""

    version: Annotated[int, Meta(ge=1, le=255)]
    sender: Name
    sequence: Count
    sent_ms: Milliseconds


class Fingerprint(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What both ends of a session must share (tokenizer, vocabulary, noise) and, for information, the model."""

    tokenizer: Annotated[str, Meta(max_length=64)]
    vocab_size: Annotated[int, Meta(ge=2, lt=2**24)]
    noise: Annotated[str, Meta(max_length=32)]
    model: Annotated[str, Meta(max_length=128)]


class Sampling(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The target law of one generation. Temperature 0 is greedy; `coupling` is a key of `couplings.COUPLINGS`."""

    seed: Seed
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.8
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    coupling: Annotated[str, Meta(max_length=32)] = "gumbel"


class Presence(Message, tag=1, frozen=True):
    """Retained state of a party; its last will is the same message with `online` false.

    `upstream` is the fingerprint of the cloud as the edge knows it; None for an agent, and while no cloud is seen.
    """

    role: Literal["agent", "edge", "cloud"]
    online: bool
    software: Annotated[str, Meta(max_length=64)]
    fingerprint: Fingerprint | None = None
    upstream: Fingerprint | None = None


class Prompt(Message, tag=2, frozen=True):
    """Ask an agent for a generation. None leaves a choice to the agent's own configuration.

    The request is pointless `patience_ms` after its arrival: a span, because the clocks of client and device may differ.
    """

    request: Name
    text: Text
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] = 64
    seed: Seed | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    stop: Annotated[tuple[Text, ...], Meta(max_length=MAX_STOPS)] = ()
    preset: Name | None = None
    patience_ms: Milliseconds | None = None


class Output(Message, tag=3, frozen=True):
    """Committed tokens of one request, in order and never taken back.

    `position` counts generated tokens before this message; `sources` has one entry per id of `ids`. The last message
    of a request has `finish` set; `error` explains the finish reasons "error" and "cancelled". `client` is the sender of
    the prompt. A request that was not served carries a `refusal`: "invalid" values, a request name that is "taken" by
    another prompt, an agent that is too "busy", or one that came to it too "late".
    """

    request: Name
    position: Position
    ids: tuple[TokenId, ...]
    sources: tuple[Source, ...]
    text: Text
    finish: FinishReason | None = None
    error: Reason = ""
    statistics: dict[str, float] = {}
    client: Name | None = None
    refusal: Refusal | None = None


class Prime(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Everything a cloud needs to begin or re-create a session: the law, and the ids before the block's base."""

    sampling: Sampling
    fingerprint: Fingerprint
    context: Ids


class Rider(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A block of another session that travels with an escalation: committed ids that are to be scored, and nothing else.

    The fields are those of `Escalation`. The edge takes riders off and sends them on as blocks of their own.
    """

    session: Session
    epoch: Count
    base: Position
    ids: Ids
    fixed: Position
    before: Prime | Digest


class Hints(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a block may carry besides its ids.

    With `similarity` set, the edge may settle the drafts from verified neighbours that are at least so near (cosine) and
    of which `votes` agree. `branches` holds the alternatives of a tree draft (`fedhlm.decoding.tree`). `riders` are audits.
    """

    similarity: Unit | None = None
    votes: Annotated[int, Meta(ge=1, le=64)] = 1
    branches: Annotated[bytes, Meta(max_length=6 * MAX_BLOCK)] = b""
    riders: Annotated[tuple[Rider, ...], Meta(max_length=MAX_RIDERS)] = ()


class Escalation(Message, tag=4, frozen=True):
    """A block of drafted tokens to be settled, idempotent by (session, epoch, base).

    `base` is the number of context tokens (prompt included) that both ends hold; `ids` follow it, of which the first
    `fixed` are committed already (ingest and score, never replace) and the rest are drafts. `extend` asks for that many
    tokens of the LLM's own after an accepted block. `laws` holds the draft laws where the coupling needs them.
    `before` is what stands before the block: the prime, or the digest of the `base` ids (`fedhlm.decoding.ids`). A cloud that
    holds other ones, because it was restarted or an answer of its was lost, asks for the prime.
    The deadline is `patience_ms` after the sending: a span, because a device's clock may be wrong by years.
    """

    session: Session
    epoch: Count
    base: Position
    ids: Ids
    patience_ms: Milliseconds
    fixed: Position = 0
    extend: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 1
    before: Prime | Digest | None = None
    laws: Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)] = b""
    hints: Hints | None = None

    def parts(self) -> "tuple[Escalation, ...]":
        """This block without its riders, and each rider as a block of its own."""
        if self.hints is None or not self.hints.riders:
            return (self,)
        bare = replace(self.hints, riders=())
        alone = replace(self, hints=None if bare == Hints() else bare)
        return (
            alone,
            *(
                replace(
                    alone, session=r.session, epoch=r.epoch, base=r.base, ids=r.ids, fixed=r.fixed, before=r.before,
                    extend=0, laws=b"", hints=None,
                )
                for r in self.hints.riders
            ),
        )  # fmt: skip

    @property
    def prime(self) -> Prime | None:
        """The prime, where the block carries one."""
        return self.before if isinstance(self.before, Prime) else None

    @property
    def digest(self) -> int | None:
        """The digest of the ids before the block, where they do not travel."""
        return self.before if isinstance(self.before, int) else None


class Verdict(Message, tag=5, frozen=True):
    """Answer to one escalation, by the same (session, epoch, base).

    `accepted` counts the leading ids that stand (fixed ones included); `ids` continue after them: the replacement of a
    rejected draft, or the LLM's own tokens after a fully accepted block. `target_probs` (float16) is the target
    probability of each escalated id that was looked at, from which the agent computes beta. `missed` has one bit (the
    first id is the lowest bit of the first byte) for each fixed id: set where the target would have emitted another token.
    Of a verdict from a peer or neighbour the cloud knows nothing yet. A status other than
    "settled" decides nothing: "unprimed" asks for the same block with `prime`, "refused" says why in `reason`.
    """

    session: Session
    epoch: Count
    base: Position
    status: Literal["settled", "unprimed", "refused"]
    accepted: Position = 0
    ids: Ids = b""
    target_probs: Annotated[bytes, Meta(max_length=2 * MAX_CONTEXT)] = b""
    source: Literal["peer", "neighbour", "cloud"] = "cloud"
    reason: Reason = ""
    missed: Annotated[bytes, Meta(max_length=MAX_CONTEXT // 8 + 1)] = b""


def refused(header: dict[str, Any], block: Escalation | Verdict, reason: str) -> Verdict:
    """The verdict that settles nothing of a block, or in place of a verdict on it, and says why."""
    about: dict[str, Any] = {"session": block.session, "epoch": block.epoch, "base": block.base}
    return Verdict(**header, **about, status="refused", reason=reason[:MAX_REASON])


class RoutedEscalation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One escalation inside a batch, with the agent it came from."""

    agent: Name
    escalation: Escalation


class RoutedVerdict(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One verdict inside a batch, with the agent it goes to."""

    agent: Name
    verdict: Verdict


class EscalationBatch(Message, tag=6, frozen=True):
    """One message from an edge to the cloud for many agents."""

    items: Annotated[tuple[RoutedEscalation, ...], Meta(max_length=MAX_BATCH)]


class VerdictBatch(Message, tag=7, frozen=True):
    """The cloud's answers to one edge."""

    items: Annotated[tuple[RoutedVerdict, ...], Meta(max_length=MAX_BATCH)]


class Uncertain(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One doubtful draft: where it stands, its uncertainty, and the int8 key of its context (`fedhlm.peers.context_keys`)."""

    position: Position
    token: TokenId
    uncertainty: Unit
    key: Key


class UncertainTokens(Message, tag=8, frozen=True):
    """What an agent doubts, sent to its cluster before the block that escalates it.

    `space` names what the keys were made with; keys of different spaces cannot be compared.
    """

    session: Session
    space: Space
    items: Annotated[tuple[Uncertain, ...], Meta(max_length=MAX_DOUBTS)]


class Verified(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The token that the cloud settled in the context with this key."""

    key: Key
    token: TokenId


class VerifiedTokens(Message, tag=9, frozen=True):
    """What the cloud settled in a cluster, for its agents' caches and for the neighbour clusters' edges."""

    space: Space
    items: Annotated[tuple[Verified, ...], Meta(max_length=MAX_BATCH)]


class PaperThreshold(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A threshold on its way (FedHLM eqs 6-8): the tokens behind it, the control variate and the local steps taken."""

    threshold: Unit
    count: Count
    control: float = 0.0
    steps: Count = 0


class Contribution(Message, tag=10, frozen=True):
    """What a member has learnt: an agent to its edge, an edge to the cloud.

    `curves` are the member's whole sums by measure (`fedhlm.learning.curve.Curve`), so a repeated or lost message changes
    nothing that the next one does not mend. `members` counts the agents behind it.
    """

    round: Count
    members: Count
    threshold: PaperThreshold | None = None
    curves: Annotated[dict[Measure, Sums], Meta(max_length=MAX_CURVES)] = {}


class Learned(Message, tag=11, frozen=True):
    """Retained state of the federation: an edge's to its agents, the cloud's to the edges."""

    round: Count
    members: Count
    refused: Count = 0
    threshold: PaperThreshold | None = None
    curves: Annotated[dict[Measure, Sums], Meta(max_length=MAX_CURVES)] = {}


class Profile(Message, tag=12, frozen=True):
    """A sample of an agent's tokens for clustering: keys of `dims` int8 each, and one uncertainty (uint8 of 255) each."""

    agent: Name
    dims: Annotated[int, Meta(ge=1, le=MAX_KEY)]
    keys: Annotated[bytes, Meta(max_length=256 * MAX_KEY)]
    uncertainties: Annotated[bytes, Meta(max_length=4_096)]


class Assignment(Message, tag=13, frozen=True):
    """Which cluster an agent belongs to from now on."""

    cluster: Name


class Note(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One line of a journal: monotonic time of its part in seconds, and what came in or was decided (docs/checking.md).

    `subject` is a topic's name, or says what `data` holds.
    """

    at_s: float
    kind: Kind
    subject: Annotated[str, Meta(max_length=65_535)]
    data: Annotated[bytes, Meta(max_length=MAX_PAYLOAD_BYTES)]


class Journal(Message, tag=14, frozen=True):
    """What a part took in and decided, in its own order: notes `number`, `number` + 1, ... of this `life` of it."""

    life: Session
    number: Annotated[int, Meta(ge=0, lt=2**53)]
    notes: Annotated[tuple[Note, ...], Meta(max_length=MAX_NOTES)]


class Cancel(Message, tag=15, frozen=True):
    """End a request of the same sender: the agent stops writing, and its last output has the finish "cancelled"."""

    request: Name


AnyMessage = (
    Presence
    | Prompt
    | Output
    | Escalation
    | Verdict
    | EscalationBatch
    | VerdictBatch
    | UncertainTokens
    | VerifiedTokens
    | Contribution
    | Learned
    | Profile
    | Assignment
    | Journal
    | Cancel
)

_encoder: Final = msgspec.msgpack.Encoder()
_USUAL_BYTES: Final = 3 + 9  # msgpack of a running number of 256 to 65,535 and of a time after February 1970
_decoder: Final[msgspec.msgpack.Decoder[AnyMessage]] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Serialise to msgpack."""
    return _encoder.encode(message)


def comparable_bytes(message: Message, payload_bytes: int) -> int:
    """What an encoded message of `payload_bytes` would take with a running number and a time of usual size.

    Equal for equal content, whenever it is sent and however much was sent before it. Messages inside a batch have
    headers of their own, which count as they are.
    """
    varying = len(_encoder.encode(message.sequence)) + len(_encoder.encode(message.sent_ms))
    return payload_bytes - varying + _USUAL_BYTES


def decode(payload: bytes) -> AnyMessage:
    """Parse any message.

    Raises:
        ProtocolError: too large, not msgpack, not a known message, a field out of range, or another schema version.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"payload must be at most {MAX_PAYLOAD_BYTES} bytes (got {len(payload)})")
    try:
        message = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"payload of {len(payload)} bytes is not a message: {exc}") from exc
    if message.version != SCHEMA_VERSION:
        raise ProtocolError(f"message.version must be {SCHEMA_VERSION} (got {message.version})")
    return message


def id_bytes(vocab_size: int) -> int:
    """Bytes per token id on the wire: 2 up to a vocabulary of 65,536, else 3."""
    return 2 if vocab_size <= 1 << 16 else 3


def pack_ids(ids: "list[int] | tuple[int, ...]", vocab_size: int) -> bytes:
    """Token ids as little-endian integers of `id_bytes(vocab_size)` bytes each.

    An id outside the vocabulary is the caller's bug: ValueError, or OverflowError for a negative one.
    """
    wide = np.asarray(ids, dtype="<u4")  # (n,)
    if wide.size and int(wide.max()) >= vocab_size:
        raise ValueError(f"token id must be below {vocab_size} (got {int(wide.max())})")
    return wide.view(np.uint8).reshape(-1, 4)[:, : id_bytes(vocab_size)].tobytes()


def unpack_ids(data: bytes, vocab_size: int) -> list[int]:
    """Inverse of `pack_ids`.

    Raises:
        ProtocolError: the length is not a whole number of ids, or an id is outside the vocabulary.
    """
    width = id_bytes(vocab_size)
    if len(data) % width:
        raise ProtocolError(f"ids must be a multiple of {width} bytes (got {len(data)})")
    wide = np.zeros((len(data) // width, 4), np.uint8)
    wide[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    ids = wide.view("<u4").ravel()  # (n,)
    if ids.size and int(ids.max()) >= vocab_size:
        raise ProtocolError(f"token id must be below {vocab_size} (got {int(ids.max())})")
    found: list[int] = ids.tolist()
    return found


def pack_bits(bits: "list[bool]") -> bytes:
    """One bit each, the first in the lowest bit of the first byte; trailing zero bytes are left out."""
    return np.packbits(np.asarray(bits, bool), bitorder="little").tobytes().rstrip(b"\0")


def unpack_bits(data: bytes, count: int) -> list[bool]:
    """The first `count` bits of `pack_bits`; what was left out is false."""
    # Padded here: unpackbits leaves the result uninitialised where there is no byte at all.
    padded = np.frombuffer(data.ljust((count + 7) // 8, b"\0"), np.uint8)
    return [bool(bit) for bit in np.unpackbits(padded, bitorder="little")[:count]]


def pack_probs(probs: NDArray[Any]) -> bytes:
    """Probabilities in [0, 1], shape (n,), as little-endian float16."""
    return np.asarray(probs, dtype="<f2").tobytes()


def unpack_probs(data: bytes) -> NDArray[np.float64]:
    """Inverse of `pack_probs`; shape (n,).

    Raises:
        ProtocolError: an odd number of bytes, or a value that is not a probability.
    """
    if len(data) % 2:
        raise ProtocolError(f"target_probs must be an even number of bytes (got {len(data)})")
    probs = np.frombuffer(data, "<f2").astype(np.float64)
    if not bool(np.all((probs >= 0.0) & (probs <= 1.0))):
        raise ProtocolError("target_probs holds a value outside 0..1")
    return probs
