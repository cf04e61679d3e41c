"""A small model that drafts in the vocabulary of a large one with another tokenizer (docs/algorithms.md, section 2).

`Translated` has the seam of a loaded model over the ids of the large model. After a text of such ids, it feeds the
small model the same text in the small model's own ids, and turns its law over those into a law over the large model's
ids: each small token counts for the first large token of its text. So everything outside drafts, sends, verifies and
commits ids of the large model, whose text does not depend on the law of a draft.

The text may end inside a small token. The law is then a mixture over the places in the last word where the small model
could still have been: a small token that begins with what was written since counts for what it adds to that.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from fedhlm.decoding.caches import is_cut
from fedhlm.decoding.decoder import DecoderInput, DecoderOutput, check_requests
from fedhlm.decoding.grammar import Constrain, Grammars
from fedhlm.decoding.ids import common_prefix
from fedhlm.decoding.models import LoadedModel
from fedhlm.decoding.sampling import Law
from fedhlm.decoding.spoken import Spoken, configured_target
from fedhlm.decoding.token_bytes import TokenBytes

FLOOR: Final = 1e-15  # the least probability of a token, so that its logit is finite
LIKELIEST: Final = 32  # small tokens of one place whose text is cut in its context; they hold nearly all of the mass
WORDS_KEPT: Final = 16_384  # cut words that are remembered
# A word with the space before it. Longer ones are cut, so that a text without spaces is not cut anew at every token.
_WORD: Final = re.compile(rb" ?(?:[^ ][\x80-\xbf]*){1,32}| ", re.DOTALL)


class _Step(NamedTuple):
    """The small model after one of its ids: its logits, (V,) float32, and its hidden state, (hidden_size,) float32."""

    logits: NDArray[np.float32]
    hidden: NDArray[np.float32] | None


class TranslatedCache(NamedTuple):
    """A text of `length` large ids. `cache` is the small model's after `small`, which begins as the text does.

    `places` are those of the last word, by the number of small ids before them.
    """

    length: int
    ids: tuple[int, ...]
    small: tuple[int, ...]
    cache: Any
    places: dict[int, _Step]

    def truncated(self, length: int) -> "TranslatedCache":
        """Return the cache of the first `length` ids; self when that is all of them.

        Raises:
            ValueError: `length` is negative or more than the cache holds.
        """
        if not is_cut(length, self.length):
            return self
        return self._replace(length=length, ids=self.ids[:length])


class _Reading(NamedTuple):
    """A text of large ids, as the small model reads it.

    `small` ends with the `last` ids of the last word, whose bytes are `word`. `large` are the word's ids in the text,
    None where a large token reaches into the word from before it.
    """

    small: tuple[int, ...]
    last: int
    word: bytes
    large: tuple[int, ...] | None


class Translated:
    """A small model that drafts in the vocabulary of `spoken`. See `fedhlm.decoding.models.LoadedModel`."""

    def __init__(self, small: LoadedModel, spoken: Spoken) -> None:
        """Compare the vocabularies.

        Raises:
            ModelError: the tokens of one of them cannot be read as bytes.
        """
        self.tokenizer, self.vocabulary = spoken.tokenizer, spoken.vocabulary
        self.info = replace(small.info, vocab_size=self.vocabulary.size, bos_id=spoken.bos_id, eos_ids=spoken.eos_ids)
        self.constrain: Constrain = Grammars(self.tokenizer, self.vocabulary.size, self.info.eos_ids).constrain
        self._model = small
        self._theirs = TokenBytes(self.tokenizer, self.vocabulary.size)
        self._ours = TokenBytes(small.tokenizer, small.vocabulary.size)
        self._controls = _same_controls(self._theirs.controls, self._ours.controls)
        if spoken.eos_ids and small.info.eos_ids:
            self._controls |= dict.fromkeys(spoken.eos_ids, small.info.eos_ids[0])
        self._first = self._first_ids(small.info.eos_ids, spoken.eos_ids)
        self._order = sorted(range(len(self._ours.spelt)), key=self._ours.spelt.__getitem__)
        self._sorted = [self._ours.spelt[token] for token in self._order]
        self._cut_small = lru_cache(WORDS_KEPT)(lambda word: tuple(self._ours.cut(word)))
        self._cut_large = lru_cache(WORDS_KEPT)(lambda word: tuple(self._theirs.cut(word)))

    @property
    def token_bytes(self) -> int:
        """See `LoadedModel.token_bytes`."""
        return self._model.token_bytes

    def empty_cache(self) -> TranslatedCache:
        """See `LoadedModel.empty_cache`."""
        return TranslatedCache(0, (), (), self._model.empty_cache(), {})

    def forward(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        """See `LoadedModel.forward`. The small model runs only where logits are wanted."""
        check_requests(requests, self.vocabulary.size, self.info.context)
        wholes = [(*request.cache.ids, *request.ids) for request in requests]
        caches = [request.cache for request in requests]
        rows: list[list[_Step]] = [[] for _ in requests]
        for back in range(max((request.wanted for request in requests), default=0) - 1, -1, -1):
            asked = [number for number, request in enumerate(requests) if back < request.wanted]
            prefixes = [wholes[number][: len(wholes[number]) - back] for number in asked]
            found = self._after(prefixes, [caches[number] for number in asked])
            for number, (cache, place) in zip(asked, found, strict=True):
                caches[number] = cache
                rows[number].append(place)
        return [
            self._output(got, cache._replace(length=len(whole), ids=whole))
            for got, cache, whole in zip(rows, caches, wholes, strict=True)
        ]

    def _output(self, rows: list[_Step], cache: TranslatedCache) -> DecoderOutput:
        if not rows:
            return DecoderOutput(np.zeros((0, self.vocabulary.size), np.float32), None, cache)
        hidden = [place.hidden for place in rows if place.hidden is not None]
        logits = np.stack([place.logits for place in rows])
        return DecoderOutput(logits, np.stack(hidden) if len(hidden) == len(rows) else None, cache)

    # The text in the small model's ids

    def _text(self, ids: Sequence[int]) -> _Reading:
        """Read a text of large ids. The result depends on nothing else."""
        small: list[int] = [] if self._model.info.bos_id is None else [self._model.info.bos_id]
        begin = int(ids[:1] == (self.info.bos_id,))
        last, word, large = 0, b"", None
        while begin < len(ids):
            end = begin
            while end < len(ids) and ids[end] not in self._theirs.controls:
                end += 1
            words = _WORD.findall(b"".join(self._theirs.spelt[token] for token in ids[begin:end]))
            for word in words:
                small += self._cut_small(word)
            last, word = (len(self._cut_small(words[-1])), words[-1]) if words else (0, b"")
            large = self._large_ids(ids[begin:end], len(word))
            if end < len(ids):
                last, word, large = 0, b"", None
                small += [self._controls[ids[end]]] if ids[end] in self._controls else []
            begin = end + 1
        small = small or [self._model.info.eos_ids[0] if self._model.info.eos_ids else 0]
        return self._fitting(_Reading(tuple(small), min(last, len(small) - 1), word, large))

    def _large_ids(self, ids: Sequence[int], size: int) -> tuple[int, ...] | None:
        """The last ids whose bytes are `size` together; None if there are no such ids."""
        begin = len(ids)
        while begin and size > 0:
            begin -= 1
            size -= len(self._theirs.spelt[ids[begin]])
        return tuple(ids[begin:]) if size == 0 else None

    def _fitting(self, text: _Reading) -> _Reading:
        """Leave out the beginning of a text that is longer than the small model's context, by quarters of the context."""
        room = self._model.info.context
        quarter = max(1, room // 4)
        surplus = len(text.small) - room
        if surplus <= 0:
            return text
        small = text.small[-(-surplus // quarter) * quarter :]
        return text._replace(small=small, last=min(text.last, len(small) - 1))

    # Laws

    def _after(
        self, prefixes: Sequence[tuple[int, ...]], caches: Sequence[TranslatedCache]
    ) -> list[tuple[TranslatedCache, _Step]]:
        """The law after each prefix as logits, shape (V,) of the large vocabulary, and the cache of the prefix."""
        texts = [self._text(prefix) for prefix in prefixes]
        requests, shared = [], []
        for text, cache in zip(texts, caches, strict=True):
            same = common_prefix(list(cache.small), list(text.small))
            places = {at: place for at, place in cache.places.items() if at <= same}
            needed = [at for at in range(len(text.small) - text.last, len(text.small) + 1) if at not in places]
            shared.append(places)
            if needed:
                keep = min(same, needed[0] - 1)
                ids = text.small[keep:]
                requests.append(DecoderInput(cache.cache.truncated(keep), ids, len(text.small) - needed[0] + 1))
        outputs = iter(self._model.forward(requests) if requests else ())
        found = []
        for prefix, text, cache, places in zip(prefixes, texts, caches, shared, strict=True):
            count = len(text.small)
            small_cache = cache.cache
            if count not in places or any(at not in places for at in range(count - text.last, count)):
                output = next(outputs)
                small_cache = output.cache
                for back, logits in enumerate(reversed(output.logits)):
                    hidden = None if output.hidden is None else output.hidden[-1 - back]
                    places[count - back] = _Step(logits, hidden)
            kept = {at: place for at, place in places.items() if count - text.last <= at <= count}
            held = cache.small if small_cache is cache.cache else text.small
            logits = np.log(self._law(text, kept) + FLOOR).astype(np.float32)
            found.append(
                (
                    TranslatedCache(len(prefix), prefix, held, small_cache, kept),
                    _Step(logits, kept[count].hidden),
                )
            )
        return found

    def _law(self, text: _Reading, places: dict[int, _Step]) -> Law:
        """The law of the next large id after a text, shape (V,), sums to 1."""
        total = np.zeros(self.vocabulary.size)
        weight, count = 1.0, len(text.small)
        begun = b"".join(self._ours.spelt[token] for token in text.small[count - text.last :])
        for at in range(count - text.last, count):  # places inside the word, at which it may be one small token still
            q = _softmax(places[at].logits)
            for token in self._longer(begun, q):
                after = self._next_id(text, text.word[: len(text.word) - len(begun)] + self._ours.spelt[token])
                if after is not None:
                    total[after] += weight * q[token]
            weight *= float(q[text.small[at]])
            begun = begun[len(self._ours.spelt[text.small[at]]) :]
        q = _softmax(places[count].logits)
        firsts = self._first.copy()
        for token in _likeliest(q, np.arange(q.size)):
            spelt = self._ours.spelt[token]
            if spelt and spelt[:1] != b" ":
                after = self._next_id(text, text.word + spelt)
                firsts[token] = firsts[token] if after is None else after
        known = firsts >= 0
        total += weight * np.bincount(firsts[known], q[known], self.vocabulary.size)
        return total / mass if (mass := total.sum()) > 0.0 else np.full(total.size, 1.0 / total.size)

    def _longer(self, begun: bytes, q: Law) -> list[int]:
        """The likeliest small tokens that begin with these bytes and go on."""
        if not begun:
            return []
        end = bisect_left(self._sorted, begun + b"\xff" * self._ours.longest)
        begin = bisect_left(self._sorted, begun)
        while begin < end and self._sorted[begin] == begun:
            begin += 1
        return _likeliest(q, np.array(self._order[begin:end], np.intp))

    def _next_id(self, text: _Reading, word: bytes) -> int | None:
        """The large id that follows the text if its last word goes on as `word` does; None if it would be cut otherwise."""
        if text.large is None:
            return None
        ids = self._cut_large(word)
        count = len(text.large)
        return ids[count] if len(ids) > count and ids[:count] == text.large else None

    def _first_ids(self, our_ends: Sequence[int], their_ends: Sequence[int]) -> NDArray[np.intp]:
        """The first large id of each small id's text, shape (V,) of the small vocabulary; -1 where there is none."""
        first = np.full(len(self._ours.spelt), -1, np.intp)
        for token, spelt in enumerate(self._ours.spelt):
            if spelt:
                first[token] = next(iter(self._theirs.cut(spelt)), -1)
        for theirs, ours in self._controls.items():
            first[ours] = theirs
        if their_ends:
            first[list(our_ends)] = their_ends[0]
        return first


def in_ids_of(target: str, small: LoadedModel) -> LoadedModel:
    """The small model in the ids of the tokenizer at `target`, the value of `agent.target_tokenizer`.

    It is the model itself if `target` is empty, or has the same ids.

    Raises:
        ConfigError: there is no tokenizer that can be used.
        ModelError: see `Translated`.
    """
    if not target:
        return small
    spoken = configured_target(target)
    return small if spoken.vocabulary == small.vocabulary else Translated(small, spoken)


def _same_controls(theirs: dict[int, str], ours: dict[int, str]) -> dict[int, int]:
    """Our control token of the same name for each of theirs that has one."""
    by_name = {name: token for token, name in ours.items()}
    return {token: by_name[name] for token, name in theirs.items() if name in by_name}


def _likeliest(q: Law, tokens: NDArray[np.intp]) -> list[int]:
    """The LIKELIEST of some tokens under a law, in no order."""
    if tokens.size > LIKELIEST:
        tokens = tokens[np.argpartition(-q[tokens], LIKELIEST)[:LIKELIEST]]
    return [int(token) for token in tokens]


def _softmax(logits: NDArray[np.float32]) -> Law:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(weights / weights.sum())
