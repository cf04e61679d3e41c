"""The sessions that the cloud holds, and the admission of incoming escalations.

The number of sessions is bounded, and the least recently used one is dropped first. If a dropped session is needed
again, the cloud answers `unprimed`, which costs a round trip and nothing else. Losing a cache or a context never
changes an answer.
"""

from collections import Counter, OrderedDict
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple

from cloud_verifier.verifier import Block, Session
from fedhlm.decoding.couplings import COUPLINGS, split_laws
from fedhlm.decoding.grammar import Constrain, nothing_constrains
from fedhlm.decoding.ids import common_prefix, digest_of
from fedhlm.decoding.tree import Tree, unpack_branches
from fedhlm.errors import FingerprintMismatch, GrammarError, ProtocolError
from fedhlm.protocol.fingerprint import check_agreement
from fedhlm.protocol.messages import Escalation, Fingerprint, Prime
from fedhlm.protocol.packing import id_bytes, unpack_ids

TOKEN_BYTES: Final = 48  # about what a token of a context takes as an object in two lists
GRAMMAR_TOKENS: Final = 1_200  # what a text under a grammar takes besides, about 54 KB for a small schema
SESSIONS_BYTES: Final = 64 * 1024 * 1024
DONORS_MAX: Final = 16  # sessions that are looked at for a cache to go on with
EXTEND_MAX: Final = 256  # bonus tokens per answer; who wants more asks again and waits behind the others


class Key(NamedTuple):
    """The key of a session. It includes cluster and agent, so that no other sender can reach the session."""

    cluster: str
    agent: str
    session: int

    @property
    def owner(self) -> tuple[str, str]:
        """The cluster and the agent."""
        return self.cluster, self.agent


@dataclass
class SmallCache:
    """The cache of the cloud's own small model for a session, as in `SessionEntry`."""

    cache: Any = None
    cached: int = 0


class TextStart(NamedTuple):
    """When the first block of a text came, in seconds, and how many tokens stood before it."""

    came_s: float
    base: int


@dataclass
class SessionEntry:
    """A session and the backend's cache for it (None: nothing is cached).

    The first `cached` tokens of the cache are valid. `small` is at most a few drafts longer. `start` is that of its
    text, once a block of it has been started.
    """

    state: Session
    cache: Any = None
    cached: int = 0
    small: SmallCache = field(default_factory=SmallCache)
    start: TextStart | None = None

    def drop_cache(self) -> None:
        """Forget both caches. Their tokens can be fed again."""
        self.cache, self.cached = None, 0
        self.small.cache, self.small.cached = None, 0


class UnprimedBlock(NamedTuple):
    """The cloud lacks the session, or tokens before the block's base."""


class RefusedBlock(NamedTuple):
    """The cloud can never settle this escalation."""

    reason: str


class StaleBlock(NamedTuple):
    """Nobody waits for an answer: a newer epoch of the session has been seen, or the block ends the session."""


Declined = UnprimedBlock | RefusedBlock | StaleBlock
"""The outcomes of a block that was not settled."""

Admission = Block | Declined


class Sessions:
    """A store of sessions, bounded in number and in bytes of contexts, that drops the least recently used one first.

    If the store is full and the agent of the newest session holds more than a quarter of it, that agent's own oldest
    session is dropped. An agent that keeps opening sessions therefore cannot displace those of others.
    """

    def __init__(
        self,
        *,
        fingerprint: Fingerprint,
        eos_ids: frozenset[int],
        context_max: int,
        sessions_max: int,
        sessions_bytes: int = SESSIONS_BYTES,
        constrain: Constrain = nothing_constrains,
        told: int = 0,
    ) -> None:
        self.fingerprint = fingerprint
        self.context_max = context_max
        self.sessions_max = sessions_max
        self.sessions_bytes = sessions_bytes
        self.evicted = 0
        self.mismatched = 0
        self.eos_ids = eos_ids
        self._constrain = constrain
        self._told = told
        self._entries: OrderedDict[Key, SessionEntry] = OrderedDict()
        self._keys_of: dict[tuple[str, str], OrderedDict[Key, None]] = {}  # by owner, in the same order
        self._tokens: dict[Key, int] = {}  # of each session's context, when it was used last
        self._tokens_of: Counter[tuple[str, str]] = Counter()  # their sums by owner

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, key: Key) -> SessionEntry | None:
        """Return the entry and mark it as the most recently used one; None if it does not exist."""
        entry = self._entries.get(key)
        if entry is not None:
            self._used(key)
        return entry

    def peek(self, key: Key) -> SessionEntry | None:
        """Return the entry, which does not count as use; None if it does not exist."""
        return self._entries.get(key)

    def _used(self, key: Key) -> None:
        self._entries.move_to_end(key)
        self._keys_of.setdefault(key.owner, OrderedDict())[key] = None
        self._keys_of[key.owner].move_to_end(key)

    def entries(self) -> Iterable[SessionEntry]:
        """All entries, the least recently used first."""
        return self._entries.values()

    @property
    def context_bytes(self) -> int:
        """About how many bytes all contexts take."""
        return TOKEN_BYTES * self._tokens_of.total()

    def inherit(self, key: Key, entry: SessionEntry, running: Container[Key]) -> None:
        """Move the cache of an idle session to a new one that goes on with its text, as a conversation's next turn does.

        The other session is one of the DONORS_MAX that the same agent used last, is not `running`, and can be fed
        again. It keeps its cache unless half of that is of use to the new one.
        """
        context, shared, donor = entry.state.context, 0, None
        for other in islice(reversed(self._keys_of.get(key.owner, {})), DONORS_MAX):
            held = self._entries[other]
            if held.cached and other != key and other not in running:
                length = common_prefix(held.state.fed[: held.cached], context)
                if length > shared and 2 * length >= held.cached:
                    shared, donor = length, held
        if donor is not None:
            entry.cache, entry.cached, entry.state.fed = donor.cache, shared, context[:shared]
            donor.drop_cache()

    def forget(self, key: Key) -> None:
        """Drop one session, if it exists."""
        if self._entries.pop(key, None) is not None:
            del self._keys_of[key.owner][key]
            self._tokens_of[key.owner] -= self._tokens.pop(key)
            if not self._keys_of[key.owner]:
                del self._keys_of[key.owner], self._tokens_of[key.owner]

    def _measure(self, key: Key) -> None:
        state = self._entries[key].state
        tokens = len(state.context) + (0 if state.held is None else GRAMMAR_TOKENS)
        self._tokens_of[key.owner] += tokens - self._tokens.get(key, 0)
        self._tokens[key] = tokens

    def _make_room(self, newest: Key) -> None:
        tokens_max = self.sessions_bytes // TOKEN_BYTES
        while len(self._entries) > self.sessions_max or (
            len(self._entries) > 1 and self._tokens_of.total() > tokens_max
        ):
            held = len(self._keys_of[newest.owner])
            greedy = held > max(1, self.sessions_max // 4)
            greedy |= held > 1 and self._tokens_of[newest.owner] > tokens_max // 4
            self.forget(next(iter(self._keys_of[newest.owner] if greedy else self._entries)))
            self.evicted += 1

    def admit(self, key: Key, escalation: Escalation) -> Admission:
        """Check an escalation and update its session with the prime and the epoch that it carries.

        The result is the decoded block, or the reason why nothing can be settled.
        """
        try:
            return self._admit(key, escalation)
        except ProtocolError as exc:
            return RefusedBlock(str(exc))

    def _admit(self, key: Key, escalation: Escalation) -> Admission:
        entry = self.entry(key)
        if entry is not None and escalation.epoch < entry.state.epoch:
            return StaleBlock()
        if escalation.closes:
            self.forget(key)
            return StaleBlock()
        block = self._block(escalation, entry)
        if isinstance(block, RefusedBlock):
            return block
        if escalation.prime is not None:
            refusal = self._prime(key, escalation, escalation.prime)
            if refusal is not None:
                return refusal
            entry = self.entry(key)
        if entry is None:
            return UnprimedBlock()
        self._measure(key)
        self._make_room(key)
        rejected_at = entry.state.rejected_at if escalation.epoch == entry.state.epoch else None
        if rejected_at is not None and escalation.base > rejected_at:
            return StaleBlock()
        held = entry.state.context[: escalation.base]
        if len(held) < escalation.base or escalation.digest not in (None, digest_of(held)):
            return UnprimedBlock()
        if escalation.epoch > entry.state.epoch:
            entry.state.epoch = escalation.epoch
            entry.state.rejected_at = None
        return block

    def _block(self, escalation: Escalation, entry: SessionEntry | None) -> Block | RefusedBlock:
        vocab_size = self.fingerprint.vocab_size
        # Checked before anything is unpacked, so that an escalation that is too long is refused cheaply.
        end = escalation.base + len(escalation.ids) // id_bytes(vocab_size)
        if end > self.context_max:
            return RefusedBlock(f"escalation reaches position {end}, but the model's context is {self.context_max}")
        ids = unpack_ids(escalation.ids, vocab_size)
        if escalation.fixed > len(ids):
            return RefusedBlock(
                f"escalation.fixed must be at most the {len(ids)} ids of the block (got {escalation.fixed})"
            )
        if escalation.base < 1:
            return RefusedBlock(f"escalation.base must be at least one context token (got {escalation.base})")
        if not ids and not escalation.extend:
            return RefusedBlock("escalation has no ids and extend 0, so nothing is asked")
        chain = ids[escalation.fixed :]
        branches = unpack_branches(escalation.branches, vocab_size, len(chain))
        depth = Tree(chain, branches).depth
        end = escalation.base + escalation.fixed + depth + escalation.extend
        if end > self.context_max:
            return RefusedBlock(f"escalation reaches position {end}, but the model's context is {self.context_max}")
        name = (
            escalation.prime.sampling.coupling if escalation.prime else entry.state.sampling.coupling if entry else None
        )
        if name is None:
            return Block(escalation.base, ids, escalation.fixed, 0, [])
        if name not in COUPLINGS:
            return RefusedBlock(f"sampling.coupling must be one of {', '.join(sorted(COUPLINGS))} (got {name!r})")
        if branches and not COUPLINGS[name].shared:
            return RefusedBlock(
                f"escalation.hints.branches must be empty under sampling.coupling {name!r} "
                f"(got {len(branches)} branches)"
            )
        drafts = split_laws(COUPLINGS[name], escalation.laws, len(ids) - escalation.fixed, vocab_size)
        laws = [b""] * escalation.fixed + drafts
        extend = min(escalation.extend, EXTEND_MAX)
        return Block(escalation.base, ids, escalation.fixed, extend, laws, branches, escalation.drafts)

    def _prime(self, key: Key, escalation: Escalation, prime: Prime) -> RefusedBlock | None:
        try:
            check_agreement(self.fingerprint, prime.fingerprint)
        except FingerprintMismatch as exc:
            self.mismatched += 1
            remedy = (
                "" if exc.field == "noise" else ": set agent.target_tokenizer to the tokenizer of the cloud's model"
            )
            return RefusedBlock(f"{exc}{remedy}")
        vocab_size = self.fingerprint.vocab_size
        if len(prime.context) != escalation.base * id_bytes(vocab_size):
            count = len(prime.context) // id_bytes(vocab_size)
            return RefusedBlock(f"prime.context has {count} ids, but escalation.base is {escalation.base}")
        context = unpack_ids(prime.context, vocab_size)
        entry = self._entries.get(key)
        if entry is None or entry.state.sampling != prime.sampling:
            grammar = prime.sampling.grammar
            try:
                held = None if grammar is None else self._constrain(grammar)
            except GrammarError as exc:
                return RefusedBlock(str(exc))
            state = Session(
                prime.sampling, self.fingerprint.vocab_size, self.eos_ids, context, held=held, told=self._told
            )
            self._entries[key] = SessionEntry(state)
        else:
            known = entry.state.context
            shared = common_prefix(known, context)
            if shared < len(context):  # what the device has committed overrides what was settled here
                known[shared:] = context[shared:]
        self._used(key)
        return None
