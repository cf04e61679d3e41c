"""Models by path or URL: the one table of what runs them, and what every loaded model can do.

A backend is a function that loads models of one kind. Its module is imported when the first such model is loaded.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from fedhlm.decoding.decoder import INFO_FILE, DecoderInput, DecoderOutput, ModelInfo, load_info
from fedhlm.decoding.gguf import SUFFIX, read_gguf
from fedhlm.decoding.gguf_tokenizer import spoken_in
from fedhlm.decoding.grammar import Constrain
from fedhlm.decoding.hub import CONFIG_FILE, open_tokenizer
from fedhlm.decoding.vocabulary import Vocabulary, vocabulary_of
from fedhlm.errors import ModelError
from fedhlm.process.memory import release

if TYPE_CHECKING:
    from tokenizers import Tokenizer


CONTEXT_MAX: Final = 4_096  # tokens; many models promise more than a device has memory for


class PrefixCache(Protocol):
    """Keys and values of a prefix. It is a value: a call never changes the cache that it is given."""

    def truncated(self, length: int, /) -> "PrefixCache":
        """Return the cache of the first `length` tokens."""


class LoadedModel(Protocol):
    """A causal language model. Calls block while it computes, and only one thread may make them at a time.

    Logits must not depend on how ids are cut into calls and batches, up to rounding
    (`fedhlm.decoding.invariance`). `token_bytes` is the size of one token in a cache.
    """

    info: ModelInfo
    tokenizer: "Tokenizer"
    vocabulary: Vocabulary
    constrain: Constrain

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in a cache."""

    def empty_cache(self) -> Any:
        """Return the cache before the first token, a `PrefixCache`."""

    def forward(self, requests: Sequence[DecoderInput]) -> list[DecoderOutput]:
        """Run the ids of each request after its cache, as one batch.

        Raises:
            ValueError: a request has no ids, has an id outside the vocabulary, or ends beyond `info.context`.
        """


class Backend(NamedTuple):
    """What runs one kind of models.

    `takes` says whether a path or URL is of that kind. `loader` is "module:function", with the arguments of `load_model`.
    `library` is what it imports, and `extra` what installs that; empty if every part that loads a model has an extra
    with it. `dtypes` are the types of arithmetic that it can be asked for; where there are any, the loader takes a `dtype`.
    """

    takes: Callable[[str], bool]
    loader: str
    library: str
    extra: str
    dtypes: tuple[str, ...] = ()


def is_hub_folder(model: str) -> bool:
    """Whether a path is that of a model of the Hugging Face format, which has not been exported."""
    folder = Path(model)
    return (folder / CONFIG_FILE).is_file() and not (folder / INFO_FILE).is_file()


BACKENDS: Final[dict[str, Backend]] = {
    "llama-cpp": Backend(
        lambda model: model.lower().endswith(SUFFIX), "fedhlm.decoding.llama:LlamaModel.load", "llama_cpp", "llama"
    ),
    "transformers": Backend(
        is_hub_folder, "fedhlm_zoo.torch_model:TorchDecoder.load", "torch", "models", ("float32", "bfloat16")
    ),
    "onnx": Backend(lambda _model: True, "fedhlm.decoding.decoder:Decoder.load", "onnxruntime", ""),
}
"""By name. The first one that takes a model runs it."""


def backend_of(model: str) -> str:
    """The name of the backend that runs the model at a path or URL."""
    return next(name for name, backend in BACKENDS.items() if backend.takes(model))


def load_model(
    model: str | Path,
    *,
    threads: int = 1,
    providers: Sequence[str] = (),
    keeps_memory: bool = True,
    drafting: bool = False,
    dtype: str = "",
    context: int = CONTEXT_MAX,
) -> LoadedModel:
    """Load the model at a path or URL.

    Args:
        model: its path or URL.
        threads: the number of cores that one call may use.
        providers: names of onnxruntime's providers in order of preference.
        keeps_memory: whether onnxruntime keeps memory between calls. Without it, large calls are slower.
        drafting: whether the model only drafts. llama.cpp is then as fast as it can be, and logits may depend on blocks.
        dtype: type of weights and arithmetic, where the backend has a choice. Empty: its own.
        context: the most tokens of a text of a GGUF file.

    Raises:
        ModelError: it cannot be used, or what runs it is not installed.
    """
    name = backend_of(str(model))
    backend = BACKENDS[name]
    if dtype and dtype not in backend.dtypes:
        wanted = f"one of {', '.join(backend.dtypes)}" if backend.dtypes else "left out"
        raise ModelError(f"dtype must be {wanted} for a model that {name} runs (got {dtype!r})")
    chosen = {"dtype": dtype} if dtype else {}
    module, _, function = backend.loader.partition(":")
    try:
        load = attrgetter(function)(import_module(module))
        loaded: LoadedModel = load(
            str(model),
            threads=threads,
            providers=providers,
            keeps_memory=keeps_memory,
            drafting=drafting,
            context=context,
            **chosen,
        )
    except ModuleNotFoundError as exc:
        if not backend.extra or (exc.name or "").partition(".")[0] != backend.library:
            raise
        raise ModelError(
            f"model {str(model)!r} needs {backend.library}, which is not installed: "
            f"pip install 'fedhlm[{backend.extra}]'"
        ) from exc
    release()  # loading leaves as much freed memory behind as the model takes
    return loaded


def tokenizer_at(model: Path) -> tuple["Tokenizer", Vocabulary]:
    """The tokenizer of a model folder or GGUF file, and what its ids mean. Its weights are not read.

    Raises:
        ModelError: it has no tokenizer that can be used.
    """
    if backend_of(str(model)) != "llama-cpp":
        return open_tokenizer(model), vocabulary_of(model)
    return spoken_in(read_gguf(model))


def described(model: str | Path) -> tuple[ModelInfo, Vocabulary]:
    """What a model is, and what its ids mean. Of a model folder no weights are loaded.

    Raises:
        ModelError: see `load_model`.
    """
    if backend_of(str(model)) == "onnx":
        return load_info(Path(model)), vocabulary_of(Path(model))
    loaded = load_model(model)
    return loaded.info, loaded.vocabulary
