"""The memory of an edge, without I/O: the doubtful drafts of its agents, and tokens that the cloud verified.

Verified tokens come from this cluster and from its neighbours. A doubtful draft is identified by agent, session and
position. Answers come from verified tokens only. An answer that the edge gave itself is never learnt.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

import msgspec

from fedhlm.errors import ProtocolError
from fedhlm.peers.context_keys import DIMS, Key, unpack_key
from fedhlm.peers.neighbours import Match, Memory, Origin
from fedhlm.protocol.fields import MAX_BLOCK
from fedhlm.protocol.messages import Escalation, Hints, Sampling, UncertainTokens, Verdict, Verified, VerifiedTokens
from fedhlm.protocol.packing import unpack_bits, unpack_ids, unpack_probs
from fedhlm.protocol.sources import SOURCES

SESSIONS_MAX: Final = 1_024
DOUBTS_MAX: Final = MAX_BLOCK  # per session
DOUBTS_TOTAL: Final = 65_536
DOUBTFUL_MAX: Final = 64  # per block; each one costs a search of the whole memory
PENDING_MAX: Final = 4_096
PENDING_BYTES: Final = 16 * 1024 * 1024
LIKELIEST: Final = 0.5  # a token with a higher probability is the likeliest one of its law
DIGEST_MAX: Final = 64  # verified tokens in one digest to the neighbours
DIGESTS_MAX: Final = 16  # digests that may wait while the bus is slow; the oldest are dropped first


class PeersAnswer(NamedTuple):
    """An answer from verified tokens. It accepts the whole block, which has `accepted` ids.

    `source` is the farthest origin of the tokens that agreed.
    """

    accepted: int
    source: Literal["peer", "neighbour"]


class DraftSupport(NamedTuple):
    """What the memory knows of a doubtful draft at a position of the context.

    `match` is None if the nearest tokens disagree or are too few. `supports` is true if they agree with the draft and
    are near enough.
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
    greedy: bool | None  # whether the cloud settles it greedily; None: nothing may be learnt from it
    primes: bool


class _MemorySnapshot(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    space: str
    keys: str
    tokens: bytes


_snapshots: Final = msgspec.msgpack.Decoder(_MemorySnapshot)


class ClusterMemory:
    """The doubts, pending blocks and verified tokens of one cluster, each bounded.

    `refused_keys` counts context keys whose length is not `dims` or whose space is not that of the first key.
    """

    def __init__(self, capacity: int, *, dims: int = DIMS) -> None:
        self.dims = dims
        self.refused_keys = 0
        self._keys = ""  # the space of all keys in this memory
        self._tokens = Memory(capacity, dims)
        self._doubts: OrderedDict[tuple[str, int], dict[int, _Doubt]] = OrderedDict()
        self._doubts_held = 0
        self._pending: OrderedDict[tuple[str, int, int, int], _Block] = OrderedDict()
        self._pending_bytes = 0
        self._greedy: OrderedDict[tuple[str, int], bool] = OrderedDict()  # of the sessions that may be learnt from
        self._digest: deque[Verified] = deque(maxlen=DIGEST_MAX * DIGESTS_MAX)

    @property
    def size(self) -> int:
        """How many verified tokens the memory holds."""
        return self._tokens.size

    @property
    def capacity(self) -> int:
        """How many verified tokens the memory can hold."""
        return self._tokens.capacity

    @property
    def keys(self) -> str:
        """The space of all keys in this memory; empty before the first key."""
        return self._keys

    @property
    def waiting(self) -> int:
        """How many verified tokens have not been sent to the neighbours yet."""
        return len(self._digest)

    def belong(self, space: str) -> None:
        """Set the tokenizer and target that tokens belong to. Tokens of a former tokenizer or target are forgotten."""
        if space != self._tokens.space:
            if self._tokens.space:
                self._tokens = Memory(self._tokens.capacity, self.dims)
                self._digest.clear()
            self._tokens.space = space

    def _comparable(self, message: UncertainTokens | VerifiedTokens) -> bool:
        """Whether a message's keys are in the space of the first key. Keys of another projection cannot be compared."""
        self._keys = self._keys or message.space
        if message.space == self._keys:
            return True
        self.refused_keys += len(message.items)
        return False

    def doubt(self, agent: str, message: UncertainTokens) -> None:
        """Remember the keys of an agent's doubtful drafts. A new draft replaces the one at its position."""
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
        """Add tokens that the cloud verified in a neighbour cluster."""
        if self._comparable(message):
            self._remember(message.items, "neighbour")

    def answer(self, agent: str, escalation: Escalation, vocab_size: int) -> PeersAnswer | None:
        """Answer a block if the agent allows it and verified tokens support all its doubtful drafts; else return None.

        Drafts without a doubt count as certain. None means that the cloud must be asked. That includes blocks with more
        than DOUBTFUL_MAX doubts, and blocks for which the memory knows another token: in measurements such a token was
        hardly ever better than the draft.
        """
        source: Literal["peer", "neighbour"] | None = None
        for found in self._evidence(agent, escalation, vocab_size, used=True):
            if not found.supports or found.match is None:
                return None
            if source is None or SOURCES[found.match.origin].from_afar:
                source = found.match.origin
        return None if source is None else PeersAnswer(len(_ids(escalation.ids, vocab_size)), source)

    def evidence(self, agent: str, escalation: Escalation, vocab_size: int) -> list[DraftSupport]:
        """The evidence that `answer` uses, draft by draft, without side effects.

        Empty if `answer` asks the cloud without looking.
        """
        return list(self._evidence(agent, escalation, vocab_size, used=False))

    def _evidence(self, agent: str, escalation: Escalation, vocab_size: int, *, used: bool) -> Iterator[DraftSupport]:
        hints = escalation.hints
        if not isinstance(hints, Hints) or hints.similarity is None:
            return
        ids = _ids(escalation.ids, vocab_size)
        doubts = self._doubts_of(agent, escalation, ids)
        doubtful = [i for i in sorted(doubts) if i >= escalation.fixed]
        if len(doubtful) > DOUBTFUL_MAX:
            return
        for i in doubtful:
            match = self._tokens.nearest(doubts[i], hints.votes, theta=hints.similarity if used else math.inf)
            supports = match is not None and match.similarity >= hints.similarity and match.token == ids[i]
            yield DraftSupport(escalation.base + i, ids[i], match, supports)

    def await_verdict(self, agent: str, escalation: Escalation) -> None:
        """Remember a block that goes to the cloud, so that its verdict can be learnt."""
        name = (agent, escalation.session, escalation.epoch, escalation.base)
        earlier = self._take_pending(name)
        session, prime = (agent, escalation.session), escalation.prime
        known = self._greedy.get(session)
        greedy = known if prime is None else _is_greedy(prime.sampling)
        if greedy != known:
            self._greedy.pop(session, None)
        if earlier is not None and earlier.greedy != greedy:
            greedy = None  # it is not known which of the two the next verdict is about
        self._pending[name] = _Block(escalation.ids, escalation.fixed, greedy, prime is not None)
        self._pending_bytes += len(escalation.ids)
        while len(self._pending) > PENDING_MAX or self._pending_bytes > PENDING_BYTES:
            self._take_pending(next(iter(self._pending)))

    def _take_pending(self, name: tuple[str, int, int, int]) -> _Block | None:
        block = self._pending.pop(name, None)
        self._pending_bytes -= 0 if block is None else len(block.ids)
        return block

    def learn(self, agent: str, verdict: Verdict, vocab_size: int) -> tuple[Verified, ...]:
        """Learn from a verdict, and return the tokens that are new. Each block is learnt from once.

        The agent chooses temperature, seed and draft law, so acceptance by itself proves little. An accepted token is
        learnt only if its target probability is above one half: then no other token is likelier, at any temperature.
        The token that replaces a rejected draft is learnt only if the cloud settles greedily. Under a grammar of the
        agent's choice any token can be the likeliest one, so nothing is learnt, nor from a session whose prime the edge
        has not seen.
        """
        if verdict.status == "working":
            return ()
        block = self._take_pending((agent, verdict.session, verdict.epoch, verdict.base))
        if block is None or verdict.status != "settled":
            return ()
        if block.primes and block.greedy is not None:
            self._note_law((agent, verdict.session), greedy=block.greedy)
        ids, settled = _ids(block.ids, vocab_size), _ids(verdict.ids, vocab_size)
        accepted = min(verdict.accepted, len(ids))
        missed = unpack_bits(verdict.missed, block.fixed)
        probs = _probs(verdict.target_probs)
        tokens = {
            i: ids[i]
            for i in range(0 if block.greedy is None else min(accepted, len(probs)))
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

    def _note_law(self, session: tuple[str, int], *, greedy: bool) -> None:
        self._greedy[session] = greedy
        self._greedy.move_to_end(session)
        while len(self._greedy) > SESSIONS_MAX:
            self._greedy.popitem(last=False)

    def take_digest(self) -> tuple[Verified, ...]:
        """Remove and return the next DIGEST_MAX verified tokens for the neighbours, oldest first; may be empty."""
        return tuple(self._digest.popleft() for _ in range(min(DIGEST_MAX, len(self._digest))))

    def snapshot(self) -> bytes:
        """The verified tokens, for `restore`. Doubts and pending blocks are not saved."""
        return msgspec.msgpack.encode(_MemorySnapshot(self._tokens.space, self._keys, self._tokens.snapshot()))

    def restore(self, data: bytes) -> None:
        """Replace the verified tokens by those of a snapshot.

        Raises:
            ProtocolError: the data is not a snapshot, or has other dimensions. Nothing changes then.
        """
        try:
            held = _snapshots.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise ProtocolError(f"cluster memory cannot be decoded: {exc}") from exc
        self._tokens = Memory.restore(held.tokens, self._tokens.capacity, self.dims, space=held.space)
        self._keys = held.keys

    def _doubts_of(self, agent: str, block: Escalation | Verdict, ids: list[int]) -> dict[int, Key]:
        """The keys of a block's doubtful drafts, by index.

        A doubt about another token belongs to a rolled-back draft.
        """
        known = self._doubts.get((agent, block.session), {})
        found = ((i, token, known.get(block.base + i)) for i, token in enumerate(ids)) if known else ()
        return {i: doubt.key for i, token, doubt in found if doubt is not None and doubt.token == token}

    def _forget_doubts(self, agent: str, verdict: Verdict, *, replaced_at: int | None) -> None:
        """Forget doubts before the block and, after a rejection, doubts about the drafts that followed it."""
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


def _is_greedy(sampling: Sampling) -> bool | None:
    """Whether the cloud settles greedily under this sampling; None: nothing may be learnt from what it settles."""
    return None if sampling.grammar is not None else sampling.temperature == 0.0


def _ids(data: bytes, vocab_size: int) -> list[int]:
    """Unpack token ids; empty if they are not ids of this vocabulary. The cloud then refuses the block."""
    try:
        return unpack_ids(data, vocab_size)
    except ProtocolError:
        return []


def _probs(data: bytes) -> list[float]:
    """Unpack target probabilities; empty if the data is malformed."""
    try:
        return [float(p) for p in unpack_probs(data)]
    except ProtocolError:
        return []
