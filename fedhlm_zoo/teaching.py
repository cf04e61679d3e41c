"""What a small model learns from: texts in rows of one length, and a large model's laws at every token of them.

A folder holds files of ROWS rows. What is finished is kept, so the large model reads each row once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

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


@torch.inference_mode()
def laws_at(model: Any, rows: Rows, *, temperature: float, vocabulary: int) -> LawLessons:
    """Read the large model's laws at every token of rows."""
    kept: list[list[Tensor]] = [[], [], []]
    states: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0]))
    try:
        with progress("rows read", len(rows.ids)) as ended:
            for part in torch.from_numpy(rows.ids).split(AT_ONCE):
                logits = model(part, use_cache=False).logits[..., :vocabulary].float()
                ln_p, likeliest = (logits / temperature).topk(min(LIKELIEST, vocabulary), dim=-1)
                ln_p -= torch.logsumexp(logits / temperature, dim=-1, keepdim=True)
                for kind, found in zip(kept, (likeliest, ln_p, states.pop()), strict=True):
                    kind.append(found.float() if found.is_floating_point() else found)
                for _ in part:
                    ended()
    finally:
        hook.remove()
    likeliest, ln_p, hidden = (torch.cat(kind).numpy() for kind in kept)
    counted = np.zeros_like(rows.written)
    counted[:, :-1] = rows.written[:, 1:]
    return LawLessons(rows.ids, counted, likeliest, ln_p, hidden)


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

    def write(self, number: int, length: int, seed: int, *, rows: int = ROWS) -> Rows:
        """The conversations of a file."""
        return converse(
            self.model,
            self.turns,
            self.end_ids,
            rows=rows,
            length=length,
            seed=seed * 1_000_003 + number,
            temperature=self.temperature,
            vocabulary=self.vocabulary,
        )


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
                else:
                    rows = held.write(number - len(shares), length, seed)
                save(path, laws_at(held.model, rows, temperature=held.temperature, vocabulary=held.vocabulary))
            ended()
    return files
