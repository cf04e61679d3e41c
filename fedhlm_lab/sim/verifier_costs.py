"""What calls of a pair cost on this machine, by batch, tokens and context: measured once and kept in a file."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any, Final, NamedTuple, Self

import msgspec
import numpy as np

from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import LoadedModel
from fedhlm.errors import FedhlmError
from fedhlm.process.files import replace_file
from fedhlm_lab.sim.pace import ModelPace, measured

BATCHES: Final = (1, 4, 16, 32)
WIDTHS: Final = (1, 4, 9)  # tokens of a request: one of plain decoding, and blocks of drafts with a bonus token
CONTEXTS: Final = (16, 64, 192)
REPEATS: Final = 3


class VerifierCall(NamedTuple):
    """A measured call: requests, tokens of each, tokens before them, and seconds of the processor."""

    batch: int
    width: int
    context: int
    seconds: float


class GridPace(NamedTuple):
    """The time of a call between measured ones, linear in each of batch, tokens and context.

    Beyond the grid the nearest two go on. `cheaper` divides what a call costs beyond the smallest one.
    """

    batches: Sequence[int]
    widths: Sequence[int]
    contexts: Sequence[int]
    seconds: Sequence[float]  # batches x widths x contexts
    cheaper: float = 1.0

    def of_call(self, rows: int, width: int, past: int) -> float:
        """The seconds of a call of `rows` requests, padded to `width` tokens after `past` cached ones."""
        shape = (len(self.batches), len(self.widths), len(self.contexts))
        found = np.asarray(self.seconds, float).reshape(shape)
        smallest = float(found[0, 0, 0])
        for grid, at in ((self.batches, rows), (self.widths, width), (self.contexts, past)):
            found = between(grid, found, at)
        return smallest + max(0.0, float(found) - smallest) / self.cheaper


def between(grid: Sequence[int], values: Any, at: float) -> Any:
    """Values over a grid, shape (grid, ...): linear between its points and beyond its last, constant before its first."""
    if len(grid) == 1:
        return values[0]
    right = min(max(int(np.searchsorted(grid, at)), 1), len(grid) - 1)
    share = (at - grid[right - 1]) / (grid[right] - grid[right - 1])
    return values[right - 1] + max(0.0, share) * (values[right] - values[right - 1])


class PairCosts(msgspec.Struct, frozen=True):
    """The measured calls of the LLM, and the pace of the SLM on the same machine."""

    model: str
    calls: Sequence[VerifierCall]
    small: ModelPace

    def pace(self, cheaper: float = 1.0) -> GridPace:
        """The LLM's pace; see `GridPace.cheaper`."""
        known = {(call.batch, call.width, call.context): call.seconds for call in self.calls}
        batches, widths, contexts = (sorted({name[axis] for name in known}) for axis in range(3))
        seconds = [known[b, w, c] for b in batches for w in widths for c in contexts]
        return GridPace(batches, widths, contexts, seconds, cheaper)

    @classmethod
    def measure(
        cls, model: str, large: LoadedModel, small: LoadedModel, *, clock_s: Callable[[], float] = process_time
    ) -> Self:
        """Measure both models. They must run on one thread, because the time is the processor's."""
        calls = [
            VerifierCall(batch, width, context, fastest(large, batch, width, context, clock_s))
            for context in CONTEXTS
            if context + max(WIDTHS) <= large.info.context
            for batch in BATCHES
            for width in WIDTHS
        ]
        return cls(model, calls, measured(small, clock_s=clock_s))

    @classmethod
    def load_or_measure(cls, folder: Path, model: str, large: LoadedModel, small: LoadedModel) -> Self:
        """Read the costs of a pair from the folder, or measure and save them.

        Raises:
            FedhlmError: the folder cannot be written, or its file is not one of ours.
        """
        file = folder / f"costs-{hashlib.sha256(model.encode()).hexdigest()[:16]}.json"
        try:
            if file.exists():
                return msgspec.json.decode(file.read_bytes(), type=cls)
            costs = cls.measure(model, large, small)
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, msgspec.json.format(msgspec.json.encode(costs), indent=1))
        except msgspec.MsgspecError as exc:
            raise FedhlmError(f"the file of costs {str(file)!r} must be one of ours: delete it ({exc})") from exc
        except OSError as exc:
            raise FedhlmError(f"the file of costs {str(file)!r} cannot be used: {exc.strerror or exc}") from exc
        return costs


def fastest(decoder: LoadedModel, batch: int, width: int, context: int, clock_s: Callable[[], float]) -> float:
    """The seconds of the fastest of some equal calls."""
    ids = [1 + number % (decoder.vocabulary.size - 1) for number in range(context + width)]
    cache = decoder.forward([DecoderInput(decoder.empty_cache(), ids[:context], 1)])[0].cache
    times = []
    for _ in range(REPEATS):
        began_s = clock_s()
        decoder.forward([DecoderInput(cache, ids[context:], width)] * batch)
        times.append(clock_s() - began_s)
    return min(times)
