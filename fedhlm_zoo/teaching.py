"""What a small model learns from: texts in rows of one length, and a large model's laws at every token of them.

A folder holds files of ROWS rows. What is finished is kept, so the large model reads each row once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from fedhlm.decoding.chat import TurnIds
from fedhlm.errors import DataMissing
from fedhlm.process.files import replacing
from fedhlm.progress import progress
from fedhlm_zoo.conversations import Rows, converse

ROWS: Final = 64  # of a file
AT_ONCE: Final = 4  # rows of one call of the large model, whose logits are held at once
LIKELIEST: Final = 32  # tokens of a law that are kept; the others share the rest of the mass


class LawLessons(NamedTuple):
    """Rows, and the large model's law after each of their ids at one temperature.

    `likeliest` (rows, length, k) are the ids of the most probable tokens, `ln_p` their log-probabilities, and `hidden`
    (rows, length, width) the last hidden states.
    """

    ids: NDArray[np.int64]  # (rows, length)
    counted: NDArray[np.bool_]  # (rows, length): whether the law after the id counts
    likeliest: NDArray[np.int64]
    ln_p: NDArray[np.float32]
    hidden: NDArray[np.float32]


def rows_of_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, end_id: int, begin: Sequence[int], length: int
) -> Rows:
    """Texts one after the other, each after `begin` and before `end_id`, cut into rows. The rest of less than a row is
    left out.

    Raises:
        DataMissing: the texts have fewer tokens than one row.
    """
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    joined = [token for e in encoded for token in (*begin, *e.ids, end_id)]
    count = len(joined) // length
    if not count:
        raise DataMissing(f"texts to learn from must have at least {length} tokens (got {len(joined)})")
    ids = np.array(joined[: count * length], np.int64).reshape(count, length)
    return Rows(ids, np.ones_like(ids, np.bool_))


class _LawReader:
    """Keeps of a model's laws what lessons hold of them. Hidden states are those that the head was last given."""

    def __init__(self, model: Any, temperature: float) -> None:
        self._temperature = temperature
        self._states: list[Tensor] = []
        head = model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(lambda _module, inputs: self._states.append(inputs[0]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Likeliest ids, their log-probabilities, and hidden states, of the `logits` (..., V) that were computed last."""
        heated = logits / self._temperature
        ln_p, likeliest = heated.topk(min(LIKELIEST, logits.shape[-1]), dim=-1)
        return likeliest, ln_p - torch.logsumexp(heated, dim=-1, keepdim=True), self._states.pop().float()


@torch.inference_mode()
def laws_at(model: Any, rows: Rows, *, temperature: float, vocabulary: int) -> LawLessons:
    """Read the large model's laws at every token of rows."""
    kept = []
    with _LawReader(model, temperature) as reader, progress("rows read", len(rows.ids)) as ended:
        for part in torch.from_numpy(rows.ids).split(AT_ONCE):
            kept.append(reader.of(model(part, use_cache=False).logits[..., :vocabulary].float()))
            for _ in part:
                ended()
    return LawLessons(rows.ids, _counted(rows), *(torch.cat(kind).numpy() for kind in zip(*kept, strict=True)))


def _counted(rows: Rows) -> NDArray[np.bool_]:
    """Whether the token after each id is of the text."""
    counted = np.zeros_like(rows.written)
    counted[:, :-1] = rows.written[:, 1:]
    return counted


def save(path: Path, lessons: LawLessons) -> None:
    """Write a file of lessons."""
    with replacing(path) as file:
        np.savez(
            file,
            ids=lessons.ids.astype(np.uint32),
            counted=lessons.counted,
            likeliest=lessons.likeliest.astype(np.uint32),
            ln_p=lessons.ln_p.astype(np.float16),
            hidden=lessons.hidden.astype(np.float16),
        )


def load(path: Path) -> LawLessons:
    """Read a file of lessons."""
    with np.load(path) as held:
        return LawLessons(
            held["ids"].astype(np.int64),
            held["counted"],
            held["likeliest"].astype(np.int64),
            held["ln_p"].astype(np.float32),
            held["hidden"].astype(np.float32),
        )


class Teacher(NamedTuple):
    """A large model that teaches: `end_ids` end its texts, ids are below `vocabulary`, `turns` are those of its template.

    `temperature` is that of its answers and laws.
    """

    model: Any
    turns: TurnIds
    end_ids: tuple[int, ...]
    vocabulary: int
    temperature: float

    def write(self, number: int, length: int, seed: int, *, rows: int = ROWS) -> LawLessons:
        """The conversations of a file, and the laws that they were drawn from. Those before the first turn, and after
        the last id, are left at zero and do not count."""
        laws: list[tuple[int, tuple[Tensor, ...]]] = []
        with _LawReader(self.model, self.temperature) as reader:
            written = converse(
                self.model,
                self.turns,
                self.end_ids,
                rows=rows,
                length=length,
                seed=seed * 1_000_003 + number,
                temperature=self.temperature,
                vocabulary=self.vocabulary,
                read=lambda at, logits: laws.append((at, reader.of(logits))),
            )
        kept = [np.zeros((rows, length, kind.shape[-1]), np.float32) for kind in laws[0][1]]
        for at, law in laws:
            for held, kind in zip(kept, law, strict=True):
                held[:, at] = kind.reshape(rows, -1).numpy()
        return LawLessons(written.ids, _counted(written), kept[0].astype(np.int64), *kept[1:])


def gather(
    folder: Path, teacher: Callable[[], Teacher], *, given: Rows | None, tokens: int, length: int, seed: int
) -> list[Path]:
    """Collect lessons: those on rows of texts, and on about `tokens` tokens that the teacher writes itself.

    Args:
        folder: gets a file for each ROWS rows; those that are there are kept.
        teacher: opens the large model, which is not asked for if nothing is missing.
        given: rows of texts (None: there are none).
        tokens: how many the teacher writes.
        length: tokens of a row.
        seed: of what the teacher writes.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shares = [] if given is None else [slice(begin, begin + ROWS) for begin in range(0, len(given.ids), ROWS)]
    files = [folder / f"given-{number:04}.npz" for number in range(len(shares))]
    files += [folder / f"written-{number:04}.npz" for number in range(-(-tokens // (ROWS * length)))]
    held: Teacher | None = None
    with progress("files of lessons", len(files)) as ended:
        for number, path in enumerate(files):
            if not path.is_file():
                held = held or teacher()
                if given is not None and number < len(shares):
                    rows = Rows(given.ids[shares[number]], given.written[shares[number]])
                    save(path, laws_at(held.model, rows, temperature=held.temperature, vocabulary=held.vocabulary))
                else:
                    save(path, held.write(number - len(shares), length, seed))
            ended()
    return files
