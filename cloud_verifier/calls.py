"""One model call under construction: blocks that run, how much of each fits, and whose cache makes room. No I/O."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from numpy.typing import NDArray

from cloud_verifier.sessions import Key, SessionEntry, SmallCache
from cloud_verifier.verifier import Feed, Settled
from fedhlm.protocol.messages import Escalation

READS: Final = 24  # reading this many cached tokens costs as much as computing one (benchmarks/load.py)
PIECE_MIN: Final = 16  # a smaller piece is not worth its share of a call


class BlockJob(NamedTuple):
    """An escalation that came at `came_s`; times are in seconds on the batcher's clock. For `watch` see `settle`."""

    key: Key
    escalation: Escalation
    expires_s: float
    watch: Callable[[NDArray[Any]], object] | None = None
    came_s: float = math.inf

    @property
    def size_bytes(self) -> int:
        """About how many bytes the job takes while it waits."""
        e = self.escalation
        context = len(e.prime.context) if e.prime else 0
        return len(e.ids) + len(e.laws) + context + len(e.branches)

    def tokens(self, id_bytes: int) -> int:
        """About how many tokens the model computes for it, `id_bytes` bytes an id: prime, block and bonus tokens."""
        e = self.escalation
        context = len(e.prime.context) if e.prime else 0
        return (len(e.ids) + context) // id_bytes + e.extend

    def only_scores(self, id_bytes: int) -> bool:
        """Whether all its tokens are committed, as in an audit. No text waits for the answer."""
        e = self.escalation
        return bool(e.ids) and e.extend == 0 and e.fixed * id_bytes >= len(e.ids)

    def repeats(self, other: "BlockJob") -> bool:
        """Whether both jobs carry the same block, which was sent again."""
        a, b = self.escalation, other.escalation
        return (self.key, a.epoch, a.base) == (other.key, b.epoch, b.base)


@dataclass(eq=False)
class Running:
    """A block that has been started and is not settled yet.

    `steps` is the generator that settles the block, and `feed` is what it asks for next. The session's `fed` ids are
    what the cache must hold, and the first `entry.cached` of them are in it. The next call feeds `piece` more ids.

    `reader` is the cache of the model that the feed is for.

    `short` says that the block asked for little work. `turn` orders the blocks of a cluster, and `served` counts the
    tokens since the turn was computed. `number` is the order in which blocks were started. `evictions` counts how often
    this block lost its cache. `rows` collects logits, each of shape (rows, V).
    """

    job: BlockJob
    entry: SessionEntry
    steps: Generator[Feed, NDArray[Any], Settled]
    feed: Feed
    number: int
    turn: float
    short: bool
    served: float = 0.0
    evictions: int = 0
    piece: int = 0
    rows: list[NDArray[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.want(self.feed)

    def want(self, feed: Feed) -> None:
        """Accept the generator's next request."""
        self.feed, self.rows = feed, []
        self.reader.cached = min(self.reader.cached, feed.keep)

    @property
    def reader(self) -> "SessionEntry | SmallCache":
        """The session's cache that the next piece extends."""
        return self.entry.small if self.feed.small else self.entry

    @property
    def fed(self) -> list[int]:
        """The ids that this cache must hold."""
        return self.entry.state.fed_small if self.feed.small else self.entry.state.fed

    @property
    def left(self) -> int:
        """How many ids remain to be fed."""
        return len(self.fed) - self.reader.cached

    @property
    def wanted(self) -> int:
        """How many rows of logits the next piece must return."""
        end = self.reader.cached + self.piece
        first = len(self.fed) - self.feed.rows + sum(len(rows) for rows in self.rows)
        return max(0, end - max(self.reader.cached, first))

    @property
    def cost(self) -> float:
        """What the next piece costs by itself, in computed tokens."""
        return self.piece + self.reader.cached / READS


class Call:
    """A model call under construction.

    Its cost is its number of rows times the longest row, because rows are padded. `tokens_max` bounds the cost and
    `rows_max` the rows.
    """

    def __init__(self, tokens_max: int, rows_max: int) -> None:
        self.batch: list[Running] = []
        self.tokens_max = tokens_max
        self._rows_max = rows_max
        self._width = 0
        self._past = 0

    @property
    def full(self) -> bool:
        """Whether the call has no room for even one more token."""
        return len(self.batch) >= self._rows_max or self._cost(1, 0) > self.tokens_max

    def _cost(self, width: int, past: int) -> float:
        width, past = max(width, self._width), max(past, self._past)
        return (len(self.batch) + 1) * (width + past / READS) if self.batch else 0.0

    def piece_of(self, running: Running, tokens_max: int) -> int:
        """How many ids of a block fit into a call of `tokens_max`; 0 if the piece would be too small to be worth it."""
        past, left = running.reader.cached, running.left
        if not self.batch:
            return min(left, max(1, tokens_max // 2, tokens_max - past // READS))
        room = int(tokens_max / (len(self.batch) + 1) - max(past, self._past) / READS)
        # A short block at the head must not wait for pieces of long contexts. They go with the next call.
        piece = min(left, room, max(self.batch[0].piece, PIECE_MIN if left <= PIECE_MIN else 0))
        fits = piece >= min(left, PIECE_MIN) and self._cost(piece, past) <= tokens_max
        return piece if fits else 0

    def add(self, running: Running, piece: int) -> None:
        """Add a piece of a block to the call."""
        running.piece = piece
        self.batch.append(running)
        self._width, self._past = max(self._width, piece), max(self._past, running.reader.cached)


class CacheRoom:
    """The cache space that is available while a call is put together, in tokens.

    Caches of idle sessions are evicted first, the least recently used before the others. Caches of running blocks
    follow, the last in line first. A block can take the cache of a block that was started earlier only once. Without
    this rule two blocks could evict each other's caches for ever.
    """

    def __init__(self, tokens_max: int, entries: Iterable[SessionEntry], running: Sequence[Running]) -> None:
        self.evicted = 0
        owners = {id(r.entry): r for r in running}
        all_of_them = {id(entry): entry for entry in (*entries, *(r.entry for r in running))}
        self._free = tokens_max - sum(entry.cached for entry in all_of_them.values())
        self._idle = deque(e for name, e in all_of_them.items() if e.cached and name not in owners)
        self._running = sorted(running, key=lambda r: (not r.short, r.turn))
        self._oldest = min((r.number for r in running), default=0)

    def grow(self, running: Running, piece: int, batch: Sequence[Running]) -> bool:
        """Make room for a piece of a block.

        If there is not enough room, return False and evict no running block's cache.
        """
        while self._free < piece and self._idle:
            idle = self._idle.popleft()
            if idle is not running.entry and all(idle is not other.entry for other in batch):  # they were started since
                self._drop(idle)
        if self._free < piece:
            victims = [v for v in reversed(self._running) if v is not running and v not in batch and v.entry.cached]
            victims = [v for v in victims if v.number > running.number or not v.evictions]
            alone = not batch and running.number == self._oldest
            if not alone and self._free + sum(v.entry.cached for v in victims) < piece:
                return False
            for victim in victims:
                if self._free >= piece:
                    break
                victim.evictions += 1
                self._drop(victim.entry)
        self._free -= piece
        return True

    def _drop(self, entry: SessionEntry) -> None:
        self._free += entry.cached
        self.evicted += 1
        entry.drop_cache()
