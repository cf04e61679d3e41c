"""GGUF models on llama.cpp (llama-cpp-python).

Keys and values of a text live in a sequence of llama.cpp's cache, or are set aside as bytes while other texts need the
sequences. A cache of ours is a prefix of a text. A text is continued in place where no other cache needs what follows
the prefix, and copied elsewhere.
"""

import atexit
import ctypes
import logging
import os
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.caches import is_cut
from fedhlm.decoding.decoder import DecoderInput, DecoderOutput, FileInfo, ModelInfo, check_requests
from fedhlm.decoding.gguf import Gguf, digest_of, read_gguf
from fedhlm.decoding.gguf_tokenizer import spoken_in
from fedhlm.decoding.grammar import Constrain, Grammars
from fedhlm.decoding.vocabulary import Vocabulary
from fedhlm.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

CALL_MAX: Final = 512  # tokens of one call of llama.cpp
AT_ONCE: Final = 32  # tokens that a CPU computes at once; it is not faster with more, and needs memory for each
ROOM_MIN: Final = 512  # tokens of a text for which room is made at first; it doubles when one is longer
# Sequences where each text has a room of its own. A CPU gains little by computing several texts at once; a text that is
# set aside and comes back costs a few percent of a block.
ROOMS: Final = 4
ROOMS_ELSEWHERE: Final = 16
BRANCHES: Final = 256  # tokens beside a text, for the branches of a tree
FEW: Final = 64  # sequences of a model that drafts: one text with the branches of its trees
BF16: Final = 30  # the number of this type in llama.cpp
NO_ROOM: Final = 1  # what llama_decode returns then
ERROR_LEVEL: Final = 4  # of llama.cpp's messages
_UNSUPPORTED: Final = "is_recurrent", "is_hybrid", "is_diffusion", "has_encoder"


class HeldText:
    """Keys and values of `length` tokens: in the sequence `slot`, or as bytes. `used` tells when it was needed last."""

    def __init__(self, slot: int) -> None:
        self.slot: int | None = slot
        self.aside: Any = None
        self.length = 0
        self.used = 0
        self._views: list[weakref.ref[LlamaCache]] = []
        self._lock = Lock()

    def viewed(self, cache: "LlamaCache") -> None:
        """Remember a cache that is a prefix of this text. Any thread may call this."""
        with self._lock:
            self._views.append(weakref.ref(cache))

    def needed(self) -> int:
        """How many tokens some cache needs; 0 if there is none any more."""
        with self._lock:
            alive = [(view, cache.length) for view in self._views if (cache := view()) is not None]
            self._views = [view for view, _ in alive]
        return max((length for _, length in alive), default=0)


class LlamaCache:
    """The first `length` tokens of a text; see `PrefixCache`."""

    def __init__(self, text: HeldText | None, length: int) -> None:
        self.text = text
        self.length = length
        if text is not None:
            text.viewed(self)

    def truncated(self, length: int) -> "LlamaCache":
        """See `PrefixCache.truncated`.

        Raises:
            ValueError: `length` is negative or more than the cache holds.
        """
        return LlamaCache(self.text if length else None, length) if is_cut(length, self.length) else self


class _Fed(NamedTuple):
    """One request of a call: the text that it continues, its ids, and for how many of the last ones logits are wanted."""

    text: HeldText
    ids: Sequence[int]
    wanted: int


_Entry = tuple[int, int, int, bool]
"""A token of a call: id, position, sequence, and whether its logits are wanted."""


class _Arguments:
    """The arguments of llama_decode for up to CALL_MAX tokens, each of one sequence."""

    def __init__(self, library: Any) -> None:
        self._tokens = np.zeros(CALL_MAX, np.int32)
        self._positions = np.zeros(CALL_MAX, np.int32)
        self._counts = np.ones(CALL_MAX, np.int32)
        self._slots = np.zeros(CALL_MAX, np.int32)
        begin = self._slots.ctypes.data
        self._pointers = np.arange(begin, begin + self._slots.nbytes, self._slots.itemsize, dtype=np.uintp)
        self._wanted = np.zeros(CALL_MAX, np.int8)
        self.arguments = library.llama_batch()
        kinds = dict(library.llama_batch._fields_)
        arrays: dict[str, NDArray[Any]] = {
            "token": self._tokens,
            "pos": self._positions,
            "n_seq_id": self._counts,
            "seq_id": self._pointers,
            "logits": self._wanted,
        }
        for name, array in arrays.items():
            setattr(self.arguments, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def fill(self, entries: Sequence[_Entry]) -> None:
        """Write the entries of one call."""
        count = len(entries)
        columns = np.array(entries, np.int32)  # (entries, 4)
        self._tokens[:count], self._positions[:count], self._slots[:count], self._wanted[:count] = columns.T
        self.arguments.n_tokens = count


class LlamaModel:
    """A GGUF model, a `LoadedModel`.

    One that drafts gives hidden states, and its texts share a room, as the branches of a tree do. Otherwise each text
    has a room of its own, so that it costs nothing that others are open.
    """

    def __init__(
        self, gguf: Gguf, library: Any, weights: "_Weights", *, threads: int, drafting: bool, context: int
    ) -> None:
        """`weights` are those of the same file."""
        self._library = library
        self._weights = weights
        model = weights.pointer
        vocabulary = library.llama_model_get_vocab(model)
        self.tokenizer: Tokenizer
        self.vocabulary: Vocabulary
        self.tokenizer, self.vocabulary = spoken_in(gguf)
        self.info = _info_of(gguf, library, model, vocabulary, size=self.vocabulary.size, context=context)
        self.constrain: Constrain = Grammars(self.tokenizer, self.vocabulary.size, self.info.eos_ids).constrain
        self._threads = threads
        self._rooms = not drafting
        self._on_cpu = not library.llama_supports_gpu_offload()
        several = ROOMS if self._on_cpu else ROOMS_ELSEWHERE
        self._slots = FEW if drafting else several  # llama.cpp reads no text that was set aside with another number
        self._rows = int(library.llama_vocab_n_tokens(vocabulary))
        self._batch = _Arguments(library)
        self._texts: dict[int, HeldText] = {}  # by sequence
        self._claimed: set[HeldText] = set()  # by the requests of this call
        self._turns = count()
        self._context: Any = None
        self._open(min(ROOM_MIN, self.info.context))

    @classmethod
    def load(
        cls,
        path: str,
        *,
        threads: int = 1,
        providers: Sequence[str] = (),
        drafting: bool = False,
        context: int = 4_096,
        **_others: object,
    ) -> Self:
        """Load a file. See `fedhlm.decoding.models.load_model`.

        Raises:
            ModelError: the file is no GGUF file, is not whole, or holds a model that llama.cpp or this project cannot run.
        """
        gguf = read_gguf(Path(path))
        # Waiting threads sleep, because several parts may share the cores of one small machine. Read as it is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import llama_cpp

        said = listen(llama_cpp)
        weights = _Weights(llama_cpp, path, repacked=drafting)
        if not weights.pointer:
            reason = next((line for line in said if "error loading model" in line), "") or " ".join(said)
            raise ModelError(f"{path} cannot be loaded by llama.cpp: {reason.rpartition('error loading model: ')[2]}")
        for name in _UNSUPPORTED:
            if getattr(llama_cpp, f"llama_model_{name}")(weights.pointer):
                kind = gguf.get("general.architecture", str)
                raise ModelError(f"{path} must be a decoder with attention alone (got {kind!r}, which {name})")
        if providers:
            log.warning("llama.cpp runs on what it was built for: providers are those of onnxruntime")
        return cls(gguf, llama_cpp, weights, threads=threads or os.cpu_count() or 1, drafting=drafting, context=context)

    @property
    def token_bytes(self) -> int:
        """See `LoadedModel.token_bytes`."""
        info = self.info
        return 2 * 2 * info.layers * info.kv_heads * info.head_dim  # numbers of 16 bits

    def empty_cache(self) -> LlamaCache:
        """See `LoadedModel.empty_cache`."""
        return LlamaCache(None, 0)

    def forward(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        """See `LoadedModel.forward`."""
        check_requests(requests, self.vocabulary.size, self.info.context)
        room = max(request.cache.length + len(request.ids) for request in requests)
        if room > self._room:
            self._open(min(self.info.context, max(2 * self._room, room)))
        outputs: list[DecoderOutput] = []
        most = self._slots - 1  # one more may be copied from
        for begin in range(0, len(requests), most):
            outputs += self._fitting(requests[begin : begin + most])
        return outputs

    def _fitting(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        """Run requests together if there is room for all, and else in halves."""
        try:
            return self._together(requests)
        except _NoRoom as exc:
            if len(requests) == 1:
                raise ModelError(f"llama.cpp has no room for a text in {self._room} tokens") from exc
        half = len(requests) // 2
        return [*self._fitting(requests[:half]), *self._fitting(requests[half:])]

    # Sequences

    def _open(self, room: int) -> None:
        """Begin with rooms for texts of `room` tokens. Texts that were open are set aside."""
        for text in list(self._texts.values()):
            self._set_aside(text)
        self._context = None  # frees the last one before the next one is made
        library = self._library
        self._room = room
        parameters = library.llama_context_default_params()
        parameters.n_ctx = room * self._slots if self._rooms else room + BRANCHES
        parameters.n_batch = CALL_MAX
        parameters.n_ubatch = AT_ONCE if self._on_cpu else CALL_MAX
        if self._rooms and self._on_cpu:
            # With keys and values of one type, a CPU adds up in an order that depends on the size of a block.
            parameters.type_v = BF16
        parameters.n_seq_max = self._slots
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.kv_unified = not self._rooms
        parameters.swa_full = True
        parameters.no_perf = True
        self._context = _Context(library, self._weights, parameters)
        self._memory = library.llama_get_memory(self._context.pointer)

    def _together(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        """Run requests in as few calls as their ids fit in."""
        for text in [text for text in self._texts.values() if not text.needed()]:
            self._drop(text)
        try:
            fed = [_Fed(self._continued(r.cache), r.ids, r.wanted) for r in requests]
            rows, hidden = self._computed(fed)
        except BaseException:
            for text in self._claimed:  # as they were
                if text.slot is not None:
                    self._library.llama_memory_seq_rm(self._memory, text.slot, text.length, -1)
            raise
        finally:
            self._claimed.clear()
        outputs, begin = [], 0
        for text, ids, wanted in fed:
            text.length = text.length + len(ids)
            end = begin + wanted
            states = None if hidden is None else hidden[begin:end]
            outputs.append(DecoderOutput(rows[begin:end], states, LlamaCache(text, text.length)))
            begin = end
        return outputs

    def _continued(self, cache: LlamaCache) -> HeldText:
        """A text in a sequence that holds `cache` and nothing more, and that this request alone may continue."""
        text = cache.text
        if text is None:
            text = self._begun()
        else:
            if text.slot is None:
                self._restore(text)
            if text in self._claimed or text.needed() > cache.length:
                text = self._copied(text)
            if text.length > cache.length:
                self._library.llama_memory_seq_rm(self._memory, text.slot, cache.length, -1)
                text.length = cache.length
        self._claim(text)
        return text

    def _claim(self, text: HeldText) -> None:
        self._claimed.add(text)
        text.used = next(self._turns)

    def _begun(self) -> HeldText:
        """An empty text in a free sequence."""
        slot = next((slot for slot in range(self._slots) if slot not in self._texts), None)
        if slot is None:
            oldest = self._idle()
            if oldest is None:
                raise _NoRoom
            slot = oldest.slot or 0
            self._set_aside(oldest)
        text = self._texts[slot] = HeldText(slot)
        return text

    def _idle(self) -> HeldText | None:
        """The text that no request of this call needs, and that was needed last the longest ago."""
        idle = [text for text in self._texts.values() if text not in self._claimed]
        return min(idle, key=lambda text: text.used, default=None)

    def _copied(self, source: HeldText) -> HeldText:
        claimed = source in self._claimed
        self._claimed.add(source)  # it stays where it is
        text = self._begun()
        if not claimed:
            self._claimed.discard(source)
        if self._rooms:  # llama.cpp would copy the whole room
            self._write(text, self._bytes_of(source))
        else:
            self._library.llama_memory_seq_cp(self._memory, source.slot, text.slot, -1, -1)
        text.length = source.length
        return text

    def _drop(self, text: HeldText) -> None:
        del self._texts[text.slot or 0]
        self._library.llama_memory_seq_rm(self._memory, text.slot, -1, -1)
        text.slot = None

    def _set_aside(self, text: HeldText) -> None:
        needed = text.needed()
        self._library.llama_memory_seq_rm(self._memory, text.slot, needed, -1)
        text.length = needed
        text.aside = self._bytes_of(text) if needed else None
        self._drop(text)

    def _restore(self, text: HeldText) -> None:
        place = self._begun()
        text.slot = place.slot
        self._texts[place.slot or 0] = text
        self._write(text, text.aside)
        text.aside = None

    def _bytes_of(self, text: HeldText) -> Any:
        pointer = self._context.pointer
        size = self._library.llama_state_seq_get_size(pointer, text.slot)
        data = (ctypes.c_uint8 * size)()
        if self._library.llama_state_seq_get_data(pointer, data, size, text.slot) != size:
            raise ModelError("llama.cpp cannot set a text aside")
        return data

    def _write(self, text: HeldText, data: Any) -> None:
        if not self._library.llama_state_seq_set_data(self._context.pointer, data, len(data), text.slot):
            raise ModelError("llama.cpp cannot read a text that was set aside")

    # Calls

    def _computed(self, fed: Sequence[_Fed]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Logits of all rows that are wanted, in order, (rows, V), and hidden states, (rows, hidden_size)."""
        silent: list[_Entry] = []
        wanted: list[_Entry] = []
        for text, ids, rows in fed:
            first = len(ids) - rows
            for number, token in enumerate(ids):
                entries = wanted if number >= first else silent
                entries.append((token, text.length + number, text.slot or 0, number >= first))
        logits: list[NDArray[np.float32]] = []
        states: list[NDArray[np.float32]] = []
        # With hidden states llama.cpp computes all rows of a call, so the silent ones get calls of their own.
        for entries in (silent, wanted) if not self._rooms else ([*silent, *wanted],):
            for begin in range(0, len(entries), CALL_MAX):
                piece = entries[begin : begin + CALL_MAX]
                self._call(piece)
                rows = sum(entry[3] for entry in piece)
                if rows:
                    pointer = self._context.pointer
                    logits.append(_array(self._library.llama_get_logits(pointer), rows, self._rows))
                    if not self._rooms:
                        width = self.info.hidden_size
                        states.append(_array(self._library.llama_get_embeddings(pointer), rows, width))
        size = self.vocabulary.size
        found = np.concatenate(logits)[:, :size] if logits else np.zeros((0, size), np.float32)
        if self._rooms:
            return found, None
        return found, np.concatenate(states) if states else np.zeros((0, self.info.hidden_size), np.float32)

    def _call(self, entries: Sequence[_Entry]) -> None:
        self._library.llama_set_embeddings(self._context.pointer, not self._rooms and entries[0][3])
        self._batch.fill(entries)
        while status := self._library.llama_decode(self._context.pointer, self._batch.arguments):
            if status != NO_ROOM:
                raise ModelError(f"llama.cpp cannot compute {len(entries)} tokens (it returned {status})")
            if (idle := self._idle()) is None:
                raise _NoRoom
            self._set_aside(idle)


class _NoRoom(Exception):
    """The sequences of one call do not fit."""


class _Weights:
    """The weights of a file in llama.cpp, freed with this object. `pointer` is None if they cannot be loaded."""

    def __init__(self, library: Any, path: str, *, repacked: bool) -> None:
        """Weights that are `repacked` are faster, take more memory, and give blocks other logits than single steps."""
        parameters = library.llama_model_default_params()
        parameters.use_extra_bufts = repacked
        self.pointer = library.llama_model_load_from_file(os.fsencode(path), parameters)
        if self.pointer:
            weakref.finalize(self, library.llama_model_free, self.pointer)


class _Context:
    """A context of llama.cpp, freed with this object, and before its weights."""

    def __init__(self, library: Any, weights: _Weights, parameters: Any) -> None:
        self.pointer = library.llama_init_from_model(weights.pointer, parameters)
        if not self.pointer:
            raise ModelError(f"llama.cpp cannot make room for {parameters.n_ctx} tokens: use a smaller model")
        weakref.finalize(self, _free, library, self.pointer, weights)


def _free(library: Any, pointer: Any, _weights: _Weights) -> None:
    library.llama_free(pointer)


def _array(pointer: Any, rows: int, width: int) -> NDArray[np.float32]:
    """A copy of llama.cpp's numbers, which the next call overwrites."""
    return np.ctypeslib.as_array(pointer, (rows, width)).copy()


def _info_of(gguf: Gguf, library: Any, model: Any, vocabulary: Any, *, size: int, context: int) -> ModelInfo:
    heads = int(library.llama_model_n_head(model))
    width = int(library.llama_model_n_embd(model))
    description = ctypes.create_string_buffer(256)
    library.llama_model_desc(model, description, len(description))
    begins = library.llama_vocab_get_add_bos(vocabulary)
    trained = int(library.llama_model_n_ctx_train(model))
    return ModelInfo(
        name=gguf.get("general.name", str, gguf.path.stem),
        architecture=gguf.get("general.architecture", str),
        vocab_size=int(library.llama_vocab_n_tokens(vocabulary)),
        context=min(trained, context),
        layers=int(library.llama_model_n_layer(model)),
        kv_heads=int(library.llama_model_n_head_kv(model)),
        head_dim=gguf.get("{arch}.attention.key_length", int, width // heads),
        hidden_size=width,
        eos_ids=tuple(token for token in range(size) if library.llama_vocab_is_eog(vocabulary, token)),
        bos_id=int(library.llama_vocab_bos(vocabulary)) if begins else None,
        parameters=int(library.llama_model_n_params(model)),
        quantisation=description.value.decode().split(" ", 2)[-1].removeprefix("all "),
        files={gguf.path.name: FileInfo(gguf.path.stat().st_size, digest_of(gguf))},
    )


_said: Final[deque[str]] = deque(maxlen=20)
_callbacks: Final[list[Any]] = []


def listen(library: Any) -> deque[str]:
    """Collect llama.cpp's errors instead of printing them; the last ones are returned, and grow on."""
    if not _callbacks:

        def hear(level: int, text: bytes, _data: object) -> None:
            line = text.decode("utf-8", "replace").strip()
            log.debug("llama.cpp: %s", line)
            if level == ERROR_LEVEL:
                _said.append(line)

        _callbacks.append(library.llama_log_callback(hear))
        library.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
        library.llama_backend_init()
        for name in ("outnull_file", "errnull_file"):  # its wrapper opens these at its import, and nobody closes them
            atexit.register(getattr(library._utils, name).close)  # noqa: SLF001 - it has no other name
    _said.clear()
    return _said
