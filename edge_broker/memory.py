"""What an edge knows of contexts, without I/O: doubts of its agents, tokens that the cloud settled, here and next door.

A doubtful draft is known by agent, session and position in the context. Answers come from verified tokens only, and
only what the cloud settled is learnt: an answer given here teaches nothing.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

import msgspec

from fedhlm.errors import ProtocolError
from fedhlm.peers.context_keys import DIMS, Key, unpack_key
from fedhlm.peers.neighbours import Match, Memory, Origin
from fedhlm.protocol.messages import (
    MAX_BLOCK,
    Escalation,
    UncertainTokens,
    Verdict,
    Verified,
    VerifiedTokens,
    unpack_bits,
    unpack_ids,
    unpack_probs,
)
from fedhlm.protocol.sources import SOURCES

SESSIONS_MAX: Final = 1_024
DOUBTS_MAX: Final = MAX_BLOCK  # of one session
DOUBTS_TOTAL: Final = 65_536
DOUBTFUL_MAX: Final = 64  # of one block; each costs a search of the whole memory
PENDING_MAX: Final = 4_096
PENDING_BYTES: Final = 16 * 1024 * 1024
LIKELIEST: Final = 0.5  # a probability above it is the largest of its law
DIGEST_MAX: Final = 64  # verified tokens in one message to the neighbours
DIGESTS_MAX: Final = 16  # messages' worth that wait while the bus is slow; the oldest go first


class PeersAnswer(NamedTuple):
    """All `accepted` ids of a block stand; `source` is the farthest origin of those that said so."""

    accepted: int
    source: Literal["peer", "neighbour"]


class Evidence(NamedTuple):
    """What is known of a block's doubtful draft at a position of the context.

    `match` is None where the voters differ or are too few; `supports` says that they hold the draft and are near enough.
    """

    position: int
    token: int
    match: Match | None
    supports: bool


class _Doubt(NamedTuple):
    token: int
    key: Key


class _Block(NamedTuple):
    ids: bytes
    fixed: int
    greedy: bool
    primes: bool


class _MemorySnapshot(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    space: str
    keys: str
    tokens: bytes


_snapshots: Final = msgspec.msgpack.Decoder(_MemorySnapshot)


class ClusterMemory:
    """Doubts, pending blocks and verified tokens of one cluster, each bounded.

    `refused_keys` counts keys of another length than `dims`, or of another space than the first.
    """

    def __init__(self, capacity: int, *, dims: int = DIMS) -> None:
        self.dims = dims
        self.refused_keys = 0
        self._keys = ""  # the space of all keys here
        self._tokens = Memory(capacity, dims)
        self._doubts: OrderedDict[tuple[str, int], dict[int, _Doubt]] = OrderedDict()
        self._doubts_held = 0
        self._pending: OrderedDict[tuple[str, int, int, int], _Block] = OrderedDict()
        self._pending_bytes = 0
        self._greedy: OrderedDict[tuple[str, int], None] = OrderedDict()  # sessions that the cloud settles greedily
        self._digest: deque[Verified] = deque(maxlen=DIGEST_MAX * DIGESTS_MAX)

    @property
    def size(self) -> int:
        """Verified tokens held."""
        return self._tokens.size

    @property
    def keys(self) -> str:
        """The space of all keys here; empty before the first."""
        return self._keys

    @property
    def waiting(self) -> int:
        """Verified tokens that the neighbours have not been sent yet."""
        return len(self._digest)

    def belong(self, space: str) -> None:
        """Say which tokenizer and target the tokens are of; those of others are forgotten."""
        if space != self._tokens.space:
            if self._tokens.space:
                self._tokens = Memory(self._tokens.capacity, self.dims)
                self._digest.clear()
            self._tokens.space = space

    def _comparable(self, message: UncertainTokens | VerifiedTokens) -> bool:
        """Whether a message's keys are of the space that was met first; those of another projection mean nothing here."""
        self._keys = self._keys or message.space
        if message.space == self._keys:
            return True
        self.refused_keys += len(message.items)
        return False

    def doubt(self, agent: str, message: UncertainTokens) -> None:
        """Remember the keys of an agent's doubtful drafts; a draft made anew replaces the one at its position."""
        if not self._comparable(message):
            return
        session = (agent, message.session)
        known = self._doubts.setdefault(session, {})
        before = len(known)
        for item in message.items:
            key = self._unpacked(item.key)
            if key is not None:
                known.pop(item.position, None)
                known[item.position] = _Doubt(item.token, key)
        while len(known) > DOUBTS_MAX:
            del known[next(iter(known))]
        self._doubts_held += len(known) - before
        self._doubts.move_to_end(session)
        while len(self._doubts) > SESSIONS_MAX or self._doubts_held > DOUBTS_TOTAL:
            self._doubts_held -= len(self._doubts.popitem(last=False)[1])

    def hear(self, message: VerifiedTokens) -> None:
        """Take in what the cloud settled in a neighbour cluster."""
        if self._comparable(message):
            self._remember(message.items, "neighbour")

    def answer(self, agent: str, escalation: Escalation, vocab_size: int) -> PeersAnswer | None:
        """Settle a block where the agent allows it and verified neighbours agree with each of its doubtful drafts.

        Drafts that nobody doubted count as certain. None: ask the cloud. So it is also where the neighbours know
        another token: measured, such a token is hardly ever better than the draft; and above DOUBTFUL_MAX doubts.
        """
        source: Literal["peer", "neighbour"] | None = None
        for found in self._evidence(agent, escalation, vocab_size, used=True):
            if not found.supports or found.match is None:
                return None
            if source is None or SOURCES[found.match.origin].from_afar:
                source = found.match.origin
        return None if source is None else PeersAnswer(len(_ids(escalation.ids, vocab_size)), source)

    def evidence(self, agent: str, escalation: Escalation, vocab_size: int) -> list[Evidence]:
        """What `answer` looks at, draft by draft; nothing is changed by looking. Empty where it asks the cloud unseen."""
        return list(self._evidence(agent, escalation, vocab_size, used=False))

    def _evidence(self, agent: str, escalation: Escalation, vocab_size: int, *, used: bool) -> Iterator[Evidence]:
        hints = escalation.hints
        if hints is None or hints.similarity is None:
            return
        ids = _ids(escalation.ids, vocab_size)
        doubts = self._doubts_of(agent, escalation, ids)
        doubtful = [i for i in sorted(doubts) if i >= escalation.fixed]
        if len(doubtful) > DOUBTFUL_MAX:
            return
        for i in doubtful:
            match = self._tokens.nearest(doubts[i], hints.votes, theta=hints.similarity if used else math.inf)
            supports = match is not None and match.similarity >= hints.similarity and match.token == ids[i]
            yield Evidence(escalation.base + i, ids[i], match, supports)

    def await_verdict(self, agent: str, escalation: Escalation) -> None:
        """Remember a block that goes to the cloud, so that its verdict can be learnt from."""
        name = (agent, escalation.session, escalation.epoch, escalation.base)
        self._take_pending(name)
        session, prime = (agent, escalation.session), escalation.prime
        if prime is not None and prime.sampling.temperature > 0.0:
            self._greedy.pop(session, None)
        greedy = session in self._greedy if prime is None else prime.sampling.temperature == 0.0
        self._pending[name] = _Block(escalation.ids, escalation.fixed, greedy, prime is not None)
        self._pending_bytes += len(escalation.ids)
        while len(self._pending) > PENDING_MAX or self._pending_bytes > PENDING_BYTES:
            self._take_pending(next(iter(self._pending)))

    def _take_pending(self, name: tuple[str, int, int, int]) -> _Block | None:
        block = self._pending.pop(name, None)
        self._pending_bytes -= 0 if block is None else len(block.ids)
        return block

    def learn(self, agent: str, verdict: Verdict, vocab_size: int) -> tuple[Verified, ...]:
        """What a verdict says the LLM would most likely write in doubtful contexts; each block teaches once.

        Temperature, seed and draft law are the agent's to choose, so that a token stands, or was drawn, says little. A
        token that stands is learnt where its probability is above one half: then no other is likelier, at any
        temperature. The one that replaced a draft is learnt where the cloud settled greedily.
        """
        block = self._take_pending((agent, verdict.session, verdict.epoch, verdict.base))
        if block is None or verdict.status != "settled":
            return ()
        if block.primes and block.greedy:
            self._settles_greedily((agent, verdict.session))
        ids, settled = _ids(block.ids, vocab_size), _ids(verdict.ids, vocab_size)
        accepted = min(verdict.accepted, len(ids))
        missed = unpack_bits(verdict.missed, block.fixed)
        probs = _probs(verdict.target_probs)
        tokens = {
            i: ids[i]
            for i in range(min(accepted, len(probs)))
            if probs[i] > LIKELIEST and (i >= block.fixed or not missed[i])
        }
        if block.greedy and accepted < len(ids) and settled:
            tokens[accepted] = settled[0]
        doubts = self._doubts_of(agent, verdict, ids)
        learnt = tuple(Verified(doubts[i].tobytes(), token) for i, token in tokens.items() if i in doubts)
        self._remember(learnt, "peer")
        self._digest.extend(learnt)
        self._forget_doubts(agent, verdict, replaced_at=verdict.base + accepted if accepted < len(ids) else None)
        return learnt

    def _settles_greedily(self, session: tuple[str, int]) -> None:
        self._greedy[session] = None
        self._greedy.move_to_end(session)
        while len(self._greedy) > SESSIONS_MAX:
            self._greedy.popitem(last=False)

    def take_digest(self) -> tuple[Verified, ...]:
        """The next at most DIGEST_MAX verified tokens for the neighbours, oldest first; empty when there are none."""
        return tuple(self._digest.popleft() for _ in range(min(DIGEST_MAX, len(self._digest))))

    def snapshot(self) -> bytes:
        """The verified tokens, for `restore`; doubts and pending blocks are of the moment."""
        return msgspec.msgpack.encode(_MemorySnapshot(self._tokens.space, self._keys, self._tokens.snapshot()))

    def restore(self, data: bytes) -> None:
        """Take over the verified tokens of a snapshot.

        Raises:
            ProtocolError: not a snapshot, or one of other dimensions; nothing has changed then.
        """
        try:
            held = _snapshots.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ProtocolError(f"cluster memory cannot be decoded: {exc}") from exc
        self._tokens = Memory.restore(held.tokens, self._tokens.capacity, self.dims, space=held.space)
        self._keys = held.keys

    def _doubts_of(self, agent: str, block: Escalation | Verdict, ids: list[int]) -> dict[int, Key]:
        """Keys of a block's drafts by index. A doubt about another token is one that a rollback has taken back."""
        known = self._doubts.get((agent, block.session), {})
        found = ((i, token, known.get(block.base + i)) for i, token in enumerate(ids)) if known else ()
        return {i: doubt.key for i, token, doubt in found if doubt is not None and doubt.token == token}

    def _forget_doubts(self, agent: str, verdict: Verdict, *, replaced_at: int | None) -> None:
        """Drop what lies before the block and, after a replacement, what was drafted behind it."""
        known = self._doubts.get((agent, verdict.session))
        if known is not None:
            kept = {p: d for p, d in known.items() if p >= verdict.base and (replaced_at is None or p < replaced_at)}
            self._doubts[agent, verdict.session] = kept
            self._doubts_held -= len(known) - len(kept)

    def _remember(self, items: tuple[Verified, ...], origin: Origin) -> None:
        for item in items:
            key = self._unpacked(item.key)
            if key is not None:
                self._tokens.add(key, item.token, origin)

    def _unpacked(self, data: bytes) -> Key | None:
        try:
            return unpack_key(data, self.dims)
        except ProtocolError:
            self.refused_keys += 1
            return None


def _ids(data: bytes, vocab_size: int) -> list[int]:
    """Token ids, or none where they are not ids of this vocabulary: the cloud says so to the agent."""
    try:
        return unpack_ids(data, vocab_size)
    except ProtocolError:
        return []


def _probs(data: bytes) -> list[float]:
    """Target probabilities, or none where they are not ones."""
    try:
        return [float(p) for p in unpack_probs(data)]
    except ProtocolError:
        return []
