"""Every message on the bus: frozen structs in one tagged union (`fedhlm.protocol.codec` encodes and decodes them).

Structs travel as msgpack arrays: first the tag, then the fields in order. The order of fields is therefore part of the
protocol, and changing it raises SCHEMA_VERSION.

Token ids and probabilities travel as raw little-endian bytes, whose length is checked before use.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from fedhlm.protocol import fields
from fedhlm.protocol.fields import (
    Count,
    Digest,
    GrammarSource,
    Ids,
    Key,
    Measure,
    Milliseconds,
    Name,
    Pair,
    Position,
    Reason,
    Seed,
    Session,
    Space,
    Sums,
    Text,
    TokenId,
    TopK,
    Unit,
)
from fedhlm.protocol.roles import Role

SCHEMA_VERSION: Final = 3


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The header of every message: schema version, sender, the sender's running number, Unix time in milliseconds."""

    version: Annotated[int, Meta(ge=1, le=255)]
    sender: Name
    sequence: Count
    sent_ms: Milliseconds


class Fingerprint(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tokenizer, vocabulary size and noise, which both ends of a session must share; and the model, for information."""

    tokenizer: Annotated[str, Meta(max_length=64)]
    vocab_size: Annotated[int, Meta(ge=2, lt=2**24)]
    noise: Annotated[str, Meta(max_length=32)]
    model: Annotated[str, Meta(max_length=128)]


class Grammar(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The grammar of a text that begins at position `start`, after its prompt (`fedhlm.decoding.grammar`)."""

    start: Position
    source: GrammarSource


class Sampling(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Sampling parameters of one generation. Temperature 0 is greedy; `coupling` is a key of `couplings.COUPLINGS`.

    The filters apply in the order of vLLM: temperature, `min_p`, `top_k`, `top_p`. A filter that removes nothing is
    None (1 for `top_p`), which is a byte on the wire. A `grammar` comes before them all.
    """

    seed: Seed
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.8
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    coupling: Annotated[str, Meta(max_length=32)] = "gumbel"
    top_k: TopK | None = None
    min_p: Unit | None = None
    grammar: Grammar | None = None


class Presence(Message, tag=1, frozen=True):
    """Retained state of a party. Its last will is the same message with `online` false.

    `upstream` is the cloud's fingerprint as the edge knows it. It is None for an agent, and while the edge sees no
    cloud.

    `connection` names one of several connections of a client. Its end ends the prompts that name the same one.
    """

    role: Role
    online: bool
    software: Annotated[str, Meta(max_length=64)]
    fingerprint: Fingerprint | None = None
    upstream: Fingerprint | None = None
    connection: Name | None = None


class Prompt(Message, tag=2, frozen=True):
    """A client's request for a generation. For fields that are None the agent uses its own configuration.

    The agent drops the request `patience_ms` after its arrival. The field is a span and no time of day, because the
    clocks of client and device may differ. A `top_k` or `min_p` of 0 removes nothing. When the `connection` of the
    sender ends, so does the request. With `receipt` the last output has a proof, if there is one.
    """

    request: Name
    text: Text
    max_tokens: Annotated[int, Meta(ge=1, le=fields.MAX_TOKENS)] = 64
    seed: Seed | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    stop: Annotated[tuple[Text, ...], Meta(max_length=fields.MAX_STOPS)] = ()
    preset: Name | None = None
    patience_ms: Milliseconds | None = None
    top_k: TopK | None = None
    min_p: Unit | None = None
    connection: Name | None = None
    grammar: GrammarSource | None = None
    receipt: bool = False


class Output(Message, tag=3, frozen=True):
    """Committed tokens of one request, in order. They are never taken back.

    `position` is the number of generated tokens before this message. `sources` has one entry per id of `ids`. The last
    message of a request has `finish` set; `error` explains the finish reasons "error" and "cancelled". `client` is the
    sender of the prompt.

    An output that rejects a request carries a `refusal`: a value is "invalid", the request name is "taken" by another
    prompt, the agent is too "busy", or the request came too "late".

    `proof` is what `fedhlm verify-receipt` needs besides the ids, in JSON: the text's receipt, and the prompt's ids.
    """

    request: Name
    position: Position
    ids: tuple[TokenId, ...]
    sources: tuple[fields.Source, ...]
    text: Text
    finish: fields.FinishReason | None = None
    error: Reason = ""
    statistics: dict[str, float] = {}
    client: Name | None = None
    refusal: fields.Refusal | None = None
    proof: Annotated[str, Meta(max_length=fields.MAX_PROOF)] | None = None


class Prime(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All that a cloud needs to open a session or open it again: sampling, fingerprint, ids before the base."""

    sampling: Sampling
    fingerprint: Fingerprint
    context: Ids


class Rider(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An audit that travels inside the escalation of another session: committed ids that the cloud is to score.

    The fields have the meaning they have in `Escalation`. The edge takes riders out and sends them on as separate
    blocks.
    """

    session: Session
    epoch: Count
    base: Position
    ids: Ids
    fixed: Position
    before: Prime | Digest


class Hints(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Optional parts of a block.

    With `similarity` set, the edge may settle the drafts from verified tokens whose context keys have at least this
    cosine and of which `votes` agree. `branches` holds the branches of a tree draft (`fedhlm.decoding.tree`). `riders`
    are audits.
    """

    similarity: Unit | None = None
    votes: Annotated[int, Meta(ge=1, le=64)] = 1
    branches: Annotated[bytes, Meta(max_length=6 * fields.MAX_BLOCK)] = b""
    riders: Annotated[tuple[Rider, ...], Meta(max_length=fields.MAX_RIDERS)] = ()


class Escalation(Message, tag=4, frozen=True):
    """A block of drafted tokens to be verified. It is idempotent by (session, epoch, base).

    `base` is the number of context tokens before the block, prompt included. `ids` follow them. The first `fixed` ids
    are committed already: the cloud scores them and never replaces them. The rest are drafts. `extend` is the number of
    bonus tokens that the agent asks for. `laws` holds the draft laws where the coupling needs them.

    `before` is the prime, or the digest of the `base` ids before the block (`fedhlm.decoding.ids`). A cloud whose
    context has another digest, because it was restarted or one of its verdicts was lost, asks for the prime.

    The deadline is `patience_ms` after the sending. It is a span, because a device's clock may be wrong by years.

    `hints` are the optional parts, or the number of tokens that a cloud with a small model of its own drafts before
    each call for bonus tokens.

    A block that asks for nothing, with no ids and `extend` 0, ends its session: blocks of it that still wait are
    dropped, the cloud forgets it, and nobody answers.
    """

    session: Session
    epoch: Count
    base: Position
    ids: Ids
    patience_ms: Milliseconds
    fixed: Position = 0
    extend: Annotated[int, Meta(ge=0, le=fields.MAX_TOKENS)] = 1
    before: Prime | Digest | None = None
    laws: Annotated[bytes, Meta(max_length=fields.MAX_PAYLOAD_BYTES)] = b""
    hints: Hints | fields.Drafts | None = None

    def parts(self) -> "tuple[Escalation, ...]":
        """Return this block without its riders, then each rider as a separate block."""
        if not isinstance(self.hints, Hints) or not self.hints.riders:
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
    def closes(self) -> bool:
        """Whether this block ends its session."""
        return not self.ids and not self.extend and self.before is None

    @property
    def prime(self) -> Prime | None:
        """The prime; None where the block carries a digest or nothing."""
        return self.before if isinstance(self.before, Prime) else None

    @property
    def branches(self) -> bytes:
        """The packed branches of a tree draft; empty if there are none."""
        return self.hints.branches if isinstance(self.hints, Hints) else b""

    @property
    def drafts(self) -> int:
        """How many tokens the cloud's own small model is to draft before each call."""
        return self.hints if isinstance(self.hints, int) else 0

    @property
    def digest(self) -> int | None:
        """The digest of the ids before the block; None where the block carries a prime or nothing."""
        return self.before if isinstance(self.before, int) else None


class Verdict(Message, tag=5, frozen=True):
    """The answer to the escalation with the same (session, epoch, base).

    `accepted` is the number of accepted ids, fixed ones included. `ids` follow them: the resampled token in place of a
    rejected draft, or the bonus tokens after a fully accepted block.

    `target_probs` (float16) holds the target probability of each id that was looked at; the agent computes beta from
    it. `missed` has one bit per fixed id, which is set where the target would have emitted another token. The first id
    is the lowest bit of the first byte.

    A verdict from a peer or neighbour has not been seen by the cloud yet. A status other than "settled" decides
    nothing: "unprimed" asks for the same block with a prime, and "refused" gives its reason in `reason`. The reason of
    a settled block says that some of its tokens are not certain to be the LLM's own. "working" says that the cloud is
    at work, on this block or on those before it, and has read `fed` ids of the prime; the answer itself follows.
    """

    session: Session
    epoch: Count
    base: Position
    status: Literal["settled", "unprimed", "refused", "working"]
    accepted: Position = 0
    ids: Ids = b""
    target_probs: Annotated[bytes, Meta(max_length=2 * fields.MAX_CONTEXT)] = b""
    source: Literal["peer", "neighbour", "cloud"] = "cloud"
    reason: Reason = ""
    missed: Annotated[bytes, Meta(max_length=fields.MAX_CONTEXT // 8 + 1)] = b""
    fed: Position = 0


class RoutedEscalation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One escalation of a batch, with the agent that sent it."""

    agent: Name
    escalation: Escalation


class RoutedVerdict(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One verdict of a batch, with the agent that it is for."""

    agent: Name
    verdict: Verdict


class EscalationBatch(Message, tag=6, frozen=True):
    """Escalations of several agents, sent by their edge to the cloud."""

    items: Annotated[tuple[RoutedEscalation, ...], Meta(max_length=fields.MAX_BATCH)]


class VerdictBatch(Message, tag=7, frozen=True):
    """Verdicts for several agents, sent by the cloud to their edge."""

    items: Annotated[tuple[RoutedVerdict, ...], Meta(max_length=fields.MAX_BATCH)]


class Uncertain(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A draft to be verified: position, token, doubt, and int8 context key (`fedhlm.peers.context_keys`)."""

    position: Position
    token: TokenId
    uncertainty: Unit
    key: Key


class UncertainTokens(Message, tag=8, frozen=True):
    """Doubtful drafts of an agent, sent to its cluster before the block that escalates them.

    `space` names the projection and tokenizer of the keys. Keys of different spaces cannot be compared.
    """

    session: Session
    space: Space
    items: Annotated[tuple[Uncertain, ...], Meta(max_length=fields.MAX_DOUBTS)]


class Verified(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A verified token: the context key, and the token that the cloud settled in that context."""

    key: Key
    token: TokenId


class VerifiedTokens(Message, tag=9, frozen=True):
    """Verified tokens of a cluster, for the caches of its agents and for the edges of other clusters."""

    space: Space
    items: Annotated[tuple[Verified, ...], Meta(max_length=fields.MAX_BATCH)]


class PaperThreshold(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A threshold of FedHLM (eqs 6-8), with its number of tokens, its control variate and its number of local steps."""

    threshold: Unit
    count: Count
    control: float = 0.0
    steps: Count = 0


class Evidence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a member, or a whole fleet, knows of its error per token, by pair of models.

    `sums` are those of `fedhlm.learning.certificate.Certificate.to_bytes`, of everything since the evidence began.
    `began_ms` is the Unix time of that in milliseconds, and tells one evidence of a member from the next.
    """

    began_ms: Milliseconds
    sums: Annotated[dict[Pair, fields.LogSums], Meta(max_length=fields.MAX_PAIRS)] = {}


class Contribution(Message, tag=10, frozen=True):
    """What a member has learnt, sent by an agent to its edge or by an edge to the cloud.

    `curves` holds all sums of the member by measure (`fedhlm.learning.curve.Curve`). The next message therefore makes
    up for a repeated or lost one. `members` is the number of agents behind it. A measure ends in its pair of models, and
    `thresholds` are by pair (`fedhlm.protocol.fingerprint.pair_of`).
    """

    round: Count
    members: Count
    thresholds: Annotated[dict[Pair, PaperThreshold], Meta(max_length=fields.MAX_PAIRS)] = {}
    curves: Annotated[dict[Measure, Sums], Meta(max_length=fields.MAX_CURVES)] = {}
    evidence: Evidence | None = None


class Learned(Message, tag=11, frozen=True):
    """Retained state of the federation, published by an edge for its agents and by the cloud for the edges."""

    round: Count
    members: Count
    refused: Count = 0
    thresholds: Annotated[dict[Pair, PaperThreshold], Meta(max_length=fields.MAX_PAIRS)] = {}
    curves: Annotated[dict[Measure, Sums], Meta(max_length=fields.MAX_CURVES)] = {}
    evidence: Evidence | None = None


class Profile(Message, tag=12, frozen=True):
    """A sample of an agent's tokens for clustering. Each has a key of `dims` int8 and a doubt, as uint8 in 1/255."""

    agent: Name
    dims: Annotated[int, Meta(ge=1, le=fields.MAX_KEY)]
    keys: Annotated[bytes, Meta(max_length=256 * fields.MAX_KEY)]
    uncertainties: Annotated[bytes, Meta(max_length=4_096)]


class Assignment(Message, tag=13, frozen=True):
    """The cluster that an agent belongs to from now on."""

    cluster: Name


class Note(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One entry of a journal: an input or a decision, and its monotonic time in seconds (docs/checking.md).

    `subject` is the name of a topic, or says what `data` holds.
    """

    at_s: float
    kind: fields.Kind
    subject: Annotated[str, Meta(max_length=65_535)]
    data: Annotated[bytes, Meta(max_length=fields.MAX_PAYLOAD_BYTES)]


class Journal(Message, tag=14, frozen=True):
    """Consecutive notes of a part's journal: numbers `number`, `number` + 1, ... of the life `life`."""

    life: Session
    number: Annotated[int, Meta(ge=0, lt=2**53)]
    notes: Annotated[tuple[Note, ...], Meta(max_length=fields.MAX_NOTES)]


class Cancel(Message, tag=15, frozen=True):
    """Cancel a request of the same sender. The agent stops, and its last output has the finish reason "cancelled"."""

    request: Name


class Forget(Message, tag=16, frozen=True):
    """Retained order of an operator: drop what a member of the federation has contributed.

    A part obeys each order once. What the member contributes later counts again.
    """

    order: Session


class MemberSums(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one member of a federation counts for.

    The sums are totals over the bins of its largest curve. `blamed` counts its contributions that were rejected, by
    reason, or cut ("cut").
    """

    name: Name
    agents: Count
    seen: float
    weight: float
    harm: float
    silent_s: float
    blamed: Annotated[dict[Annotated[str, Meta(max_length=16)], Count], Meta(max_length=16)] = {}


class Roster(Message, tag=17, frozen=True):
    """Retained list of the members that an edge or the cloud knows, largest weight first.

    `left_out` is the number of further members. `obeyed` has the latest orders to forget a member.
    """

    members: Annotated[tuple[MemberSums, ...], Meta(max_length=fields.MAX_ROSTER)]
    left_out: Count = 0
    obeyed: Annotated[tuple[Session, ...], Meta(max_length=fields.MAX_ROSTER)] = ()


class MetricsReport(Message, tag=18, frozen=True):
    """The metrics of an agent, for its edge to serve to Prometheus.

    The keys of `values` are those of `fedhlm.telemetry.Counters.snapshot`. The edge ignores what it does not know.
    """

    values: Annotated[dict[Annotated[str, Meta(max_length=96)], float], Meta(max_length=fields.MAX_METRICS)] = {}


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
    | Forget
    | Roster
    | MetricsReport
)
