"""A causal language model on onnxruntime, with a key/value cache that can be truncated and continued.

A model folder holds ``model.onnx`` (and its external data), ``tokenizer.json`` and ``model.json``. A cache is a value:
`forward` never changes the cache that it is given.

Up to rounding, logits do not depend on how tokens are split into blocks or batches. Only `Decoder.load` imports
onnxruntime, and through `fedhlm.decoding.hub` tokenizers.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.caches import is_cut
from fedhlm.decoding.grammar import Constrain, Grammars
from fedhlm.decoding.hub import TOKENIZER_CONFIG_FILE, open_tokenizer
from fedhlm.decoding.vocabulary import TOKENIZER_FILE, Vocabulary, vocabulary_of
from fedhlm.errors import ModelError
from fedhlm.telemetry import warn_once

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

GRAPH_FILE: Final = "model.onnx"
INFO_FILE: Final = "model.json"
CHAT_TEMPLATE_FILE: Final = "chat_template.jinja"
CHAT_FILES: Final = (TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE)  # optional: how a conversation is written
HIDDEN_OUTPUT: Final = "hidden"
CPU: Final = "CPUExecutionProvider"
# Hashing gigabytes at every start would take longer than loading them. Larger folders are checked by file size only.
HASH_UP_TO_BYTES: Final = 64 * 1024 * 1024

_DTYPES: Final[dict[str, Any]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

_NAME_SHOWN: Final = 100  # characters of a model's name in its label
# Ids that one text feeds in a run of the graph. A CPU is not faster with more, and what a run holds grows with them.
RUN_MAX: Final = 128
RUN_MAX_ELSEWHERE: Final = 4_096  # on another device than the CPU


class FileInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and SHA-256 (hex) of one file of a model folder."""

    bytes: int
    sha256: str


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of ``model.json``. `context` is the longest sequence that the model supports, in tokens.

    `vocab_size` is the number of rows of its embedding table, which may be padded.
    """

    name: str
    architecture: str
    vocab_size: int
    context: int
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    parameters: int
    quantisation: str
    files: dict[str, FileInfo]

    @property
    def label(self) -> str:
        """The name with a short digest of the files: other weights or tokens under the same name have another label."""
        files = " ".join(f"{name} {self.files[name].sha256}" for name in sorted(self.files))
        return f"{self.name[:_NAME_SHOWN]}@{hashlib.sha256(files.encode()).hexdigest()[:8]}"


class Cache(NamedTuple):
    """Keys and values of `length` tokens: k0, v0, k1, v1, ..., each (1, kv_heads, length, head_dim)."""

    length: int
    arrays: tuple[NDArray[Any], ...]

    def truncated(self, length: int) -> "Cache":
        """Return the cache of the first `length` tokens; self when that is all of them.

        Raises:
            ValueError: `length` is negative or more than the cache holds.
        """
        if not is_cut(length, self.length):
            return self
        return Cache(length, tuple(a[:, :, :length].copy() for a in self.arrays))


class DecoderInput(NamedTuple):
    """Token ids (at least one) to run after the tokens of `cache`, with logits for the last `rows` ids (None: all).

    `cache` is one that the model has given: a `fedhlm.decoding.models.PrefixCache`.
    """

    cache: Any
    ids: Sequence[int]
    rows: int | None = None

    @property
    def wanted(self) -> int:
        """The number of rows of logits that are wanted."""
        return len(self.ids) if self.rows is None else self.rows


class DecoderOutput(NamedTuple):
    """One row for each id for which logits are wanted, and the cache up to the last id.

    `logits` is (rows, V) float32 for the V ids of the tokenizer; padding of the model is left out. `hidden` is the
    input of the output head, (rows, hidden_size) float32; it is None where the graph has no such output. The output
    head is computed only in runs of the graph whose ids include one for which logits are wanted.
    """

    logits: NDArray[np.float32]
    hidden: NDArray[np.float32] | None
    cache: Any


def check_requests(requests: Sequence[DecoderInput], size: int, context: int) -> None:
    """Check requests to a model with a vocabulary of `size` ids and a context of `context` tokens.

    Raises:
        ValueError: a request has no ids, has an id outside the vocabulary, or ends beyond the context.
    """
    for cache, ids, _ in requests:
        if not ids:
            raise ValueError("ids of a request must be at least one (got none)")
        if min(ids) < 0 or max(ids) >= size:
            raise ValueError(f"ids must be in 0..{size - 1} (got {min(ids)}..{max(ids)})")
        if cache.length + len(ids) > context:
            raise ValueError(f"cache and ids must be at most {context} tokens (got {cache.length} + {len(ids)})")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_info(folder: Path) -> ModelInfo:
    """Read ``model.json`` and check that the files of the folder are complete and unchanged.

    Raises:
        ModelError: a file is missing, malformed or different; the error names the file and what was expected.
    """
    if not folder.is_dir():
        raise ModelError(
            f"model folder must be a folder with {GRAPH_FILE}, {TOKENIZER_FILE}, {INFO_FILE} "
            f"(got {str(folder)!r}, {_no_folder(folder)})"
        )
    path, info = folder / INFO_FILE, read_info(folder)
    for name in (GRAPH_FILE, TOKENIZER_FILE):
        if name not in info.files:
            raise ModelError(f"{path} lists no {name} under 'files'")
    small = sum(f.bytes for f in info.files.values()) <= HASH_UP_TO_BYTES
    for name, listed in info.files.items():
        file = folder / name
        if Path(name).name != name:
            raise ModelError(f"files of {path} must be names without folders (got {name!r})")
        if not file.is_file():
            raise ModelError(f"{file} is missing: {INFO_FILE} expects {listed.bytes} bytes")
        if (size := file.stat().st_size) != listed.bytes:
            raise ModelError(f"{file} has {size} bytes: {INFO_FILE} expects {listed.bytes}")
        if small and file_digest(file) != listed.sha256:
            raise ModelError(f"{file} has changed: its SHA-256 is not the one in {INFO_FILE}")
    return info


def read_info(folder: Path) -> ModelInfo:
    """Read ``model.json``, whatever else the folder holds.

    Raises:
        ModelError: the file is missing or malformed.
    """
    path = folder / INFO_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=ModelInfo)
    except OSError as exc:
        raise ModelError(
            f"{path} cannot be read ({exc.strerror}): make the folder with 'fedhlm models export'"
        ) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ModelError(f"{path} is not a model description: {exc}") from exc


def _no_folder(path: Path) -> str:
    """What is found where a model folder should be, and what to do about it."""
    if path.suffix.lower() == ".gguf":
        return "a GGUF file: give 'fedhlm models export' the Hugging Face model that it was made from"
    if str(path).lower().startswith(("http:/", "https:/")):
        return "a URL: a model is run from a folder of this machine, which 'fedhlm models export' makes"
    return "which is no folder" if path.exists() else "which does not exist"


def usable_providers(wanted: Sequence[str], *, available: Sequence[str]) -> list[str]:
    """Return the `wanted` providers that are `available`, in their order, then the CPU. Warn once about the others."""
    _tell_missing(wanted, available)
    kept = dict.fromkeys(name for name in wanted if name in available)
    return [*kept, *(() if CPU in kept else (CPU,))]


def _tell_missing(wanted: Sequence[str], there: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in there]:
        names = ", ".join(missing)
        warn_once(log, names, "onnxruntime has no %s here, so the CPU is used instead (see `fedhlm doctor`)", names)


class Decoder:
    """A loaded model. Calls block while the model computes. Only one thread may use a Decoder at a time."""

    def __init__(
        self,
        *,
        session: Any,
        info: ModelInfo,
        tokenizer: "Tokenizer",
        vocabulary: Vocabulary,
        to_fetches: Any = None,
        run_max: int = RUN_MAX,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.constrain: Constrain = Grammars(tokenizer, vocabulary.size, info.eos_ids).constrain
        self._session = session
        self._to_fetches = to_fetches  # run options of onnxruntime: compute only what is fetched
        self._run_max = run_max
        inputs = {i.name: i for i in session.get_inputs()}
        outputs = [o.name for o in session.get_outputs()]
        names = [f"{layer}.{part}" for layer in range(info.layers) for part in ("key", "value")]
        self._past_names = [f"past_key_values.{n}" for n in names]
        known = {"input_ids", "attention_mask", "position_ids", *self._past_names}
        if unknown := sorted(inputs.keys() ^ (known & inputs.keys())):
            raise ModelError(f"inputs of {GRAPH_FILE} must be among {sorted(known)} (got {unknown})")
        wanted = ["logits", *(f"present.{n}" for n in names)]
        if missing := [n for n in ("input_ids", *self._past_names) if n not in inputs]:
            raise ModelError(
                f"{GRAPH_FILE} must be a decoder with {info.layers} cached layers "
                f"(got one without the inputs {missing})"
            )
        if missing := [n for n in wanted if n not in outputs]:
            raise ModelError(
                f"{GRAPH_FILE} must be a decoder with {info.layers} cached layers "
                f"(got one without the outputs {missing})"
            )
        shape = inputs[self._past_names[0]].shape
        if len(shape) != 4 or list(shape[1::2]) != [info.kv_heads, info.head_dim]:
            raise ModelError(
                f"{GRAPH_FILE} has a key cache of shape {shape}: "
                f"{INFO_FILE} expects (1, {info.kv_heads}, length, {info.head_dim})"
            )
        self._has_hidden = HIDDEN_OUTPUT in outputs
        self._output_names = [*wanted, HIDDEN_OUTPUT] if self._has_hidden else wanted
        self._cache_dtype = _DTYPES[inputs[self._past_names[0]].type]
        self._has_mask = "attention_mask" in inputs
        self._has_positions = "position_ids" in inputs
        self._ones = np.ones((1, info.context), np.int64)
        self._positions = np.arange(info.context, dtype=np.int64)[None]  # (1, context)
        empty = np.zeros((1, info.kv_heads, 0, info.head_dim), self._cache_dtype)
        self._empty = Cache(0, (empty,) * len(names))

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        threads: int = 1,
        providers: Sequence[str] = (),
        keeps_memory: bool = True,
        **_others: object,
    ) -> Self:
        """Load a model folder.

        Args:
            folder: the model folder.
            threads: the number of cores that one call may use.
            providers: names of onnxruntime's providers in order of preference. Absent ones are left out with one
                warning, and the CPU takes their place.
            keeps_memory: whether memory is kept between calls. Without it, large calls are slower.

        Raises:
            ModelError: the folder is not a usable model; the error names the file and what was expected.
        """
        import onnxruntime

        folder = Path(folder)
        info = load_info(folder)
        vocabulary = vocabulary_of(folder)
        tokenizer = open_tokenizer(folder)
        if vocabulary.size > info.vocab_size:
            raise ModelError(
                f"ids of {folder / TOKENIZER_FILE} must be below {info.vocab_size}, the size of the model's vocabulary "
                f"(got {vocabulary.size - 1})"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = keeps_memory
        # Waiting threads sleep, because several parts may share the cores of one small machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        usable = usable_providers(providers, available=onnxruntime.get_available_providers())
        try:
            session = onnxruntime.InferenceSession(str(folder / GRAPH_FILE), options, providers=usable)
        except Exception as exc:  # onnxruntime's exception classes share no base below Exception
            raise ModelError(f"{folder / GRAPH_FILE} cannot be loaded by onnxruntime: {exc}") from exc
        # onnxruntime itself leaves out a provider whose driver or device is absent.
        _tell_missing(usable, session.get_providers())
        to_fetches = onnxruntime.RunOptions()
        to_fetches.only_execute_path_to_fetches = True
        return cls(
            session=session,
            info=info,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            to_fetches=to_fetches,
            run_max=RUN_MAX if session.get_providers()[0] == CPU else RUN_MAX_ELSEWHERE,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in a cache."""
        info = self.info
        item_bytes = int(np.dtype(self._cache_dtype).itemsize)
        return 2 * info.layers * info.kv_heads * info.head_dim * item_bytes

    def empty_cache(self) -> Cache:
        """Return the cache before the first token."""
        return self._empty

    def forward(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        """Run the ids of each request after its cache. Several requests share one run of the graph if it has a mask.

        The ids of a single request are fed in pieces, so that a long text needs little more memory than its cache.

        Raises:
            ValueError: a request has no ids, has an id outside the vocabulary, or ends beyond `info.context`.
        """
        check_requests(requests, self.vocabulary.size, self.info.context)
        # A graph without mask and positions reads padding as text, so it runs one request at a time.
        if len(requests) > 1 and self._has_mask and self._has_positions:
            return self._run_padded(requests)
        return [self._run_one(request) for request in requests]

    def _outputs(self, feeds: dict[str, NDArray[Any]], *, rows: int, batch: int) -> tuple[Any, Any, list[Any]]:
        """Return logits, hidden states and cache arrays. Without `rows` only the cache arrays are computed."""
        if rows:
            outputs = self._session.run(self._output_names, feeds)
            return (
                outputs[0][..., : self.vocabulary.size],
                outputs[-1] if self._has_hidden else None,
                outputs[1 : 1 + len(self._past_names)],
            )
        outputs = self._session.run(self._output_names[1 : 1 + len(self._past_names)], feeds, self._to_fetches)
        nothing = np.zeros((batch, 0, self.vocabulary.size), np.float32)
        hidden = np.zeros((batch, 0, self.info.hidden_size), np.float32) if self._has_hidden else None
        return nothing, hidden, outputs

    def _run_one(self, request: DecoderInput) -> DecoderOutput:
        cache, ids, _ = request
        first = len(ids) - request.wanted  # of the ids for which logits are wanted
        logits, hiddens = [], []
        for begin in range(0, len(ids), self._run_max):
            piece = ids[begin : begin + self._run_max]
            end = cache.length + len(piece)
            feeds: dict[str, NDArray[Any]] = dict(zip(self._past_names, cache.arrays, strict=True))
            feeds["input_ids"] = np.array([piece], np.int64)  # (1, ids)
            if self._has_mask:
                feeds["attention_mask"] = self._ones[:, :end]
            if self._has_positions:
                feeds["position_ids"] = self._positions[:, cache.length : end]
            unwanted = max(0, first - begin)  # leading ids of the piece
            rows, hidden, arrays = self._outputs(feeds, rows=max(0, len(piece) - unwanted), batch=1)
            logits.append(rows[0, unwanted:])
            hiddens += [] if hidden is None else [hidden[0, unwanted:]]
            cache = Cache(end, tuple(arrays))
        return DecoderOutput(_joined(logits), _joined(hiddens) if hiddens else None, cache)

    def _run_padded(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        past = max(cache.length for cache, _, _ in requests)
        width = max(len(ids) for _, ids, _ in requests)
        shape = (len(requests), self.info.kv_heads, past, self.info.head_dim)
        feeds: dict[str, NDArray[Any]] = {name: np.empty(shape, self._cache_dtype) for name in self._past_names}
        ids_fed = np.zeros((len(requests), width), np.int64)
        mask = np.zeros((len(requests), past + width), np.int64)
        positions = np.zeros((len(requests), width), np.int64)
        for row, (cache, ids, _) in enumerate(requests):
            begin, count = past - cache.length, len(ids)
            for name, array in zip(self._past_names, cache.arrays, strict=True):
                feeds[name][row, :, :begin] = 0.0  # it is masked, but must be finite
                feeds[name][row, :, begin:] = array[0]
            ids_fed[row, :count] = ids
            mask[row, begin : past + count] = 1
            positions[row, :count] = self._positions[0, cache.length : cache.length + count]
        feeds |= {"input_ids": ids_fed, "attention_mask": mask, "position_ids": positions}
        logits_of, hiddens, outputs = self._outputs(feeds, rows=max(r.wanted for r in requests), batch=len(requests))
        results = []
        for row, request in enumerate(requests):
            cache, ids, _ = request
            kept = slice(past - cache.length, past + len(ids))
            # A copy even where the part lies in one piece: otherwise one session's cache would hold the whole batch.
            arrays = tuple(o[row : row + 1, :, kept].copy() for o in outputs)
            wanted = slice(len(ids) - request.wanted, len(ids))
            hidden = hiddens[row, wanted].copy() if hiddens is not None else None
            logits = logits_of[row, wanted].copy()
            results.append(DecoderOutput(logits, hidden, Cache(cache.length + len(ids), arrays)))
        return results


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Rows of several pieces, one after the other. Pieces without rows are left out, unless all are."""
    some = [part for part in parts if len(part)] or parts[-1:]
    return some[0] if len(some) == 1 else np.concatenate(some)
