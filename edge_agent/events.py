"""What goes into a generation machine and what comes out of it: plan, events and actions, without behaviour."""

from collections.abc import Callable
from typing import NamedTuple

from edge_agent.gate import Gate
from edge_agent.pipeline import PipelineRules
from fedhlm.decoding.tree import Branch
from fedhlm.protocol.messages import FinishReason, Sampling, Source, Uncertain


class Drafted(NamedTuple):
    """The model's answer to a Draft: a token for `position`, its probability, uncertainty, the law's bytes and its key."""

    revision: int
    position: int
    token: int
    prob: float
    uncertainty: float
    law: bytes = b""
    key: bytes = b""


class Grown(NamedTuple):
    """The model's answer to a Draft of a tree: its main chain, and the alternatives (`fedhlm.decoding.tree`)."""

    revision: int
    position: int
    chain: list[Drafted]
    branches: tuple[Branch, ...]


class Proposal(NamedTuple):
    """What peers say of a doubtful draft: a token, `score` = 1 - cosine similarity in [0, 1], and what to do with it.

    `adopt`: the token takes the draft's place; with a `source` it is settled by it, else verified like any draft.
    What is not adopted is compared with the verdict only.
    """

    token: int
    score: float
    adopt: bool
    source: Source | None


class Plan(NamedTuple):
    """What stays fixed during a generation; times in seconds, `context_max` and `max_tokens` in tokens.

    `consult` asks the peers about a draft that the gate does not keep. `harm(draft_prob, target_prob, missed)` is what
    a committed draft costs (`fedhlm.decoding.couplings`). With `similarity` the edge may settle, by `votes` neighbours. `tau` is the gate's
    threshold, for the record.
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


class Answered(NamedTuple):
    """A verdict, decoded and range-checked; `missed` has an entry for each fixed id."""

    epoch: int
    base: int
    accepted: int
    ids: list[int]
    target_probs: list[float]
    source: Source
    missed: list[bool] = []  # noqa: RUF012 - never changed


class Unprimed(NamedTuple):
    """The cloud has lost the session, or never had it."""

    epoch: int


class Refused(NamedTuple):
    """The cloud will never settle this session."""

    reason: str


class LinkUp(NamedTuple):
    """Someone upstream is there to answer. (That nobody is shows at the deadline, and only then is text unverified.)"""


class Cancelled(NamedTuple):
    """Stop now; what is committed stays."""

    reason: FinishReason


class Tick(NamedTuple):
    """Time passed."""


Event = Drafted | Grown | Answered | Unprimed | Refused | LinkUp | Cancelled | Tick


class DraftNext(NamedTuple):
    """Ask the model for the token after `ids` or, with `levels` above 0, for a tree of at most so many levels.

    The first `settled` ids are the prompt's and the target's.
    """

    revision: int
    ids: tuple[int, ...]
    settled: int
    levels: int


class Escalate(NamedTuple):
    """Send a block; `context` is the prime's, None when the cloud holds the session; `uncertain` are its doubted drafts.

    `digest` is that of all ids before `base`, None where `context` holds them.
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


class Committed(NamedTuple):
    """One token, for good. `drafted` is false where the text comes from elsewhere than the device's own model."""

    token: int
    source: Source
    drafted: bool


class Commit(NamedTuple):
    """Tokens that follow all committed before."""

    tokens: list[Committed]


class Observation(NamedTuple):
    """What the target said of one drafted token.

    `harm` is that of the device's own draft, of uncertainty `uncertainty` (None: the verdict does not tell); `match` is
    (score, harm) of what peers proposed. `skipped`: it was committed without a verdict, by `source`, at the price
    `committed_harm`. `audit`: it was scored by the audit alone.
    """

    uncertainty: float
    beta: float
    harm: float | None
    match: tuple[float, float] | None
    committed_harm: float
    source: Source
    skipped: bool
    audit: bool


class Judged(NamedTuple):
    """Who settles a draft, for the record: `token` stands in its place at `position`, `own` is the device's draft.

    `escalate`: those above; else `source`. `score` is that of what peers proposed (`Proposal`), None without.
    """

    position: int
    token: int
    own: int
    uncertainty: float
    escalate: bool
    source: Source
    score: float | None


class Observe(NamedTuple):
    """Feedback for the learner."""

    observations: list[Observation]


class Token(NamedTuple):
    """A token of the sequence that the cloud has not verified; `source` says who settles it unless it is escalated."""

    token: int
    prob: float
    uncertainty: float
    law: bytes
    escalate: bool
    drafted_s: float
    key: bytes
    own: int  # the device's own draft, where peers replaced it
    source: Source = "local"
    match: Proposal | None = None


class Tail(NamedTuple):
    """The committed tokens at the end of a text that no verdict has scored: `context` stands before them.

    `primed`: the cloud holds the session in this `epoch`, as far as is known.
    """

    epoch: int = 0
    context: tuple[int, ...] = ()
    primed: bool = False
    tokens: tuple[Token, ...] = ()


class Finish(NamedTuple):
    """The generation is over, and leaves `tail` for an audit."""

    reason: FinishReason
    error: str = ""
    tail: Tail = Tail()


Action = DraftNext | Escalate | Commit | Judged | Observe | Finish
