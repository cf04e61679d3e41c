"""Laws of both models over many prompts, computed once and kept on disk.

A row holds a model's logits before temperature, (V,) float32, as the model gave them: nothing is cut off or rounded, so
every decision on a row is the one that a live part makes on these logits. The name of the folder is a digest of both
models and of all prompts, so laws of other models or prompts are never read by mistake.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, Self

import msgspec
import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import LoadedModel
from fedhlm.errors import FedhlmError
from fedhlm.peers.context_keys import DIMS, Projection
from fedhlm.process.files import replace_file
from fedhlm_lab.sim import toy

FORMAT: Final = 1
FACTS: Final = "laws.json"


class LawPrompt(NamedTuple):
    """The ids to read. The laws after each of the last `rows` of them are wanted."""

    ids: tuple[int, ...]
    rows: int = 1


class LawRows(NamedTuple):
    """What a model says after the last ids of a prompt: logits (rows, V) float32, and keys (rows, DIMS) int8.

    Keys are those of contexts (`fedhlm.peers.context_keys`); zeros for a model without a projection.
    """

    logits: NDArray[np.float32]
    keys: NDArray[np.int8]


class LawModel(Protocol):
    """A model as a source of laws. `name` says which files it is made of."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def after(self, prompt: LawPrompt) -> LawRows:
        """Compute the rows of a prompt."""


class DecoderLaws:
    """A model folder. An SLM (`stepwise`) reads token by token after the first row, as an agent does; an LLM in one call.

    Integer models quantise activations block by block, so an SLM's law depends on how its ids are cut.
    """

    def __init__(self, decoder: LoadedModel, projection: Projection | None = None, *, stepwise: bool = False) -> None:
        self.decoder = decoder
        self._projection = projection
        self._stepwise = stepwise

    @property
    def name(self) -> str:
        """The name, the digests of the files, and that of the projection."""
        keys = "" if self._projection is None else f" keys {self._projection.digest}"
        return f"{self.decoder.info.label}{keys}"

    @property
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer."""
        return self.decoder.vocabulary.size

    def after(self, prompt: LawPrompt) -> LawRows:
        """See `LawModel.after`."""
        first = len(prompt.ids) - prompt.rows + 1
        steps = [prompt.ids[:first], *zip(prompt.ids[first:])] if self._stepwise else [prompt.ids]
        cache, logits, hidden = self.decoder.empty_cache(), [], []
        for ids in steps:
            out = self.decoder.forward([DecoderInput(cache, ids, prompt.rows if len(steps) == 1 else 1)])[0]
            cache = out.cache
            logits.append(out.logits)
            hidden.append(out.hidden)
        keys = np.zeros((prompt.rows, DIMS), np.int8)
        if self._projection is not None:
            states = [state for block in hidden if block is not None for state in block]
            keys[: len(states)] = [self._projection.key(state) for state in states]
        return LawRows(np.concatenate(logits), keys)


class ToyLaws:
    """A toy model (`fedhlm_lab.sim.toy`); `agreement` None is the LLM."""

    def __init__(self, agreement: float | None = None) -> None:
        self._agreement = agreement

    @property
    def name(self) -> str:
        """The agreement."""
        return f"toy {self._agreement}"

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return toy.VOCAB_SIZE

    def after(self, prompt: LawPrompt) -> LawRows:
        """See `LawModel.after`."""
        ends = range(len(prompt.ids) - prompt.rows + 1, len(prompt.ids) + 1)
        contexts = [prompt.ids[:end] for end in ends]
        small = self._agreement
        rows = [toy.large_logits(c) if small is None else toy.small_logits(c, small) for c in contexts]
        keys = [np.frombuffer(toy.key_of(c), np.int8) for c in contexts]
        return LawRows(np.array(rows, np.float32), np.array(keys, np.int8))


class LawFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a folder of laws is about."""

    small: str
    large: str
    vocab_size: int
    prompts: int
    rows: int
    digest: str


class Laws(NamedTuple):
    """The laws of both models, one row for each wanted place of the prompts, in their order.

    `small` and `large` are (n, V) float32, and `keys` (n, DIMS) int8. `first[i]` is the first row of prompt i.
    """

    facts: LawFacts
    prompts: Sequence[LawPrompt]
    first: NDArray[np.int64]
    small: NDArray[np.float32]
    large: NDArray[np.float32]
    keys: NDArray[np.int8]

    @classmethod
    def load_or_compute(
        cls,
        cache: Path,
        prompts: Sequence[LawPrompt],
        small: LawModel,
        large: LawModel,
        ended: Callable[[], object] = lambda: None,
    ) -> Self:
        """Read the laws from the folder of this pair and these prompts under `cache`, or compute and keep them.

        `ended` is called for each computed prompt. A folder that was not finished is computed again.

        Raises:
            FedhlmError: the cache cannot be written.
        """
        facts = facts_of(prompts, small, large)
        folder = cache / facts.digest
        try:
            if not (folder / FACTS).is_file():
                _compute(folder, facts, prompts, (small, large), ended)
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("small", "large", "keys")]
        except OSError as exc:
            raise FedhlmError(f"the folder of laws {str(folder)!r} cannot be used: {exc.strerror or exc}") from exc
        first = np.concatenate([[0], np.cumsum([p.rows for p in prompts])[:-1]]).astype(np.int64)
        return cls(facts, prompts, first, *arrays)


def default_cache() -> Path:
    """The folder for laws: `fedhlm/laws` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedhlm" / "laws"


def facts_of(prompts: Sequence[LawPrompt], small: LawModel, large: LawModel) -> LawFacts:
    """Name the laws of two models over prompts.

    Raises:
        FedhlmError: the vocabularies differ, a prompt wants more rows than it has ids, or there is no prompt.
    """
    if small.vocab_size != large.vocab_size:
        raise FedhlmError(
            f"both models must have one vocabulary (got {small.vocab_size} and {large.vocab_size} tokens)"
        )
    if not prompts or any(not 1 <= p.rows <= len(p.ids) for p in prompts):
        raise FedhlmError("prompts must be at least one, and want 1 row up to as many as they have ids")
    digest = hashlib.sha256(f"{FORMAT}\n{small.name}\n{large.name}\n".encode())
    for prompt in prompts:
        digest.update(np.array([prompt.rows, len(prompt.ids), *prompt.ids], "<i8").tobytes())
    rows = sum(p.rows for p in prompts)
    return LawFacts(small.name, large.name, small.vocab_size, len(prompts), rows, digest.hexdigest()[:24])


def _compute(
    folder: Path,
    facts: LawFacts,
    prompts: Sequence[LawPrompt],
    models: tuple[LawModel, LawModel],
    ended: Callable[[], object],
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {
        name: open_memmap(folder / f"{name}.npy", "w+", dtype, (facts.rows, width))
        for name, dtype, width in (
            ("small", np.float32, facts.vocab_size),
            ("large", np.float32, facts.vocab_size),
            ("keys", np.int8, DIMS),
        )
    }
    for rows, found in _places(prompts, models):
        arrays["small"][rows], arrays["keys"][rows] = found[0]
        arrays["large"][rows] = found[1].logits
        ended()
    for array in arrays.values():
        array.flush()
    replace_file(folder / FACTS, msgspec.json.encode(facts))  # last: it says that the rest is whole


def _places(
    prompts: Sequence[LawPrompt], models: tuple[LawModel, LawModel]
) -> Iterator[tuple[slice, tuple[LawRows, LawRows]]]:
    start = 0
    for prompt in prompts:
        yield slice(start, start + prompt.rows), (models[0].after(prompt), models[1].after(prompt))
        start += prompt.rows
