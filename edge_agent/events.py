"""The input and output types of a generation machine: plan, events and actions, without behaviour."""

from collections.abc import Callable
from typing import NamedTuple

from edge_agent.gate import Gate
from edge_agent.pipeline import PipelineRules
from fedhlm.decoding.tree import Branch
from fedhlm.protocol.fields import FinishReason, Source
from fedhlm.protocol.messages import Sampling, Uncertain


class Drafted(NamedTuple):
    """The model's answer to `DraftNext`: a token for `position`, with its probability and its doubt (0 to 1).

    `law` is the encoded draft law if the coupling sends it, and `key` is the context key; both may be empty. `rule`
    names the rule by which the token is always verified (`fedhlm.decoding.important`); empty: none.
    """

    revision: int
    position: int
    token: int
    prob: float
    uncertainty: float
    law: bytes = b""
    key: bytes = b""
    rule: str = ""


class Grown(NamedTuple):
    """The model's answer to `DraftNext` for a tree: its main chain and its branches (`fedhlm.decoding.tree`)."""

    revision: int
    position: int
    chain: list[Drafted]
    branches: tuple[Branch, ...]


class Proposal(NamedTuple):
    """What peers propose for a doubtful draft: a token, and `score` = 1 - cosine similarity, in [0, 1].

    With `adopt`, the token takes the draft's place. If it has a `source`, that source settles it; otherwise it is
    verified like any draft. A proposal that is not adopted is only compared with the verdict.
    """

    token: int
    score: float
    adopt: bool
    source: Source | None


class Plan(NamedTuple):
    """The constants of a generation. Times are in seconds, `context_max` and `max_tokens` in tokens.

    `consult` asks the peers about a draft that the gate does not keep. `harm(draft_prob, target_prob, missed)` is the
    harm of a committed draft (`fedhlm.decoding.couplings`). With a `similarity` the edge may answer blocks, by `votes`
    neighbours. `tau` is the gate's threshold, for the record. In a text, waiting for a cloud that reports its work on a
    prompt adds at most `prompt_s` to `deadline_s`.
    """

    sampling: Sampling
    gate: Gate
    pipeline: PipelineRules
    max_tokens: int
    context_max: int
    eos_ids: frozenset[int]
    deadline_s: float
    retry_s: float
    harm: Callable[[float, float, bool], float]
    consult: Callable[[Drafted], Proposal | None] = lambda _draft: None
    similarity: float | None = None
    votes: int = 1
    tau: float = 1.0
    prompt_s: float = 0.0


class Answered(NamedTuple):
    """A verdict, decoded and range-checked. `missed` has one entry per fixed id."""

    epoch: int
    base: int
    accepted: int
    ids: list[int]
    target_probs: list[float]
    source: Source
    missed: list[bool] = []  # noqa: RUF012 - never modified


class Unprimed(NamedTuple):
    """The cloud does not hold the session."""

    epoch: int


class Working(NamedTuple):
    """The cloud is at work and has read `fed` ids of the context that it was sent. The answer is yet to come."""

    epoch: int
    fed: int


class Refused(NamedTuple):
    """The cloud can never settle this session."""

    reason: str


class LinkUp(NamedTuple):
    """The edge and the cloud can be reached again."""


class LinkDown(NamedTuple):
    """The edge or the cloud has announced that it is gone. A link that is lost in silence shows at the deadline."""


class Cancelled(NamedTuple):
    """Stop now. Committed tokens stay."""

    reason: FinishReason


class Tick(NamedTuple):
    """Time has passed."""


Event = Drafted | Grown | Answered | Unprimed | Working | Refused | LinkUp | LinkDown | Cancelled | Tick


class DraftNext(NamedTuple):
    """Ask the model for the token after `ids` or, if `levels` is above 0, for a tree of at most that many levels.

    The first `settled` ids belong to the prompt or were settled by the target.
    """

    revision: int
    ids: tuple[int, ...]
    settled: int
    levels: int


class Escalate(NamedTuple):
    """Send a block.

    `context` is that of the prime; None if the cloud holds the session. `digest` is the digest of all ids before
    `base`; None if `context` contains them. `uncertain` are the doubtful drafts of the block. A block `for_target` has
    a draft that is always verified, so that peers must not settle it.
    """

    epoch: int
    base: int
    ids: list[int]
    fixed: int
    extend: int
    laws: bytes
    deadline_s: float
    context: list[int] | None
    uncertain: tuple[Uncertain, ...] = ()
    branches: tuple[Branch, ...] = ()
    digest: int | None = None
    for_target: bool = False


class Committed(NamedTuple):
    """One committed token. `drafted` is false if the token does not come from the device's own model."""

    token: int
    source: Source
    drafted: bool


class Commit(NamedTuple):
    """Commit tokens; they follow all tokens committed before."""

    tokens: list[Committed]


class Observation(NamedTuple):
    """What the target said of one drafted token.

    `harm` is that of the device's own draft (None: the verdict does not tell). `match` is the score and the harm of the
    peers' proposal. `skipped` says that the token was committed without a verdict, by `source`, which cost
    `committed_harm`. `audit` says that only the audit scored it. `rule` names the rule by which it was verified
    whatever its doubt; empty: none.
    """

    uncertainty: float
    beta: float
    harm: float | None
    match: tuple[float, float] | None
    committed_harm: float
    source: Source
    skipped: bool
    audit: bool
    rule: str = ""


class Judged(NamedTuple):
    """Who settles a draft, for the record. `token` stands at `position`, and `own` is the device's draft.

    If `escalate`, the draft is sent up; otherwise `source` settles it. `score` is that of the peers' `Proposal`; None
    without one. `rule` names the rule by which it is sent up whatever its doubt; empty: none.
    """

    position: int
    token: int
    own: int
    uncertainty: float
    escalate: bool
    source: Source
    score: float | None
    rule: str = ""


class Observe(NamedTuple):
    """Observations for the learner."""

    observations: list[Observation]


class Token(NamedTuple):
    """A token that the cloud has not verified. `source` settles it unless `escalate` is true."""

    token: int
    prob: float
    uncertainty: float
    law: bytes
    escalate: bool
    drafted_s: float
    key: bytes
    own: int  # the device's own draft, which peers may have replaced
    source: Source = "local"
    match: Proposal | None = None
    rule: str = ""


class Tail(NamedTuple):
    """The committed tokens at the end of a text that no verdict has scored. `context` precedes them.

    `primed` says that the cloud holds the session in this `epoch`, as far as is known.
    """

    epoch: int = 0
    context: tuple[int, ...] = ()
    primed: bool = False
    tokens: tuple[Token, ...] = ()


class Finish(NamedTuple):
    """The generation is over. `tail` is left for an audit."""

    reason: FinishReason
    error: str = ""
    tail: Tail = Tail()


Action = DraftNext | Escalate | Commit | Judged | Observe | Finish
