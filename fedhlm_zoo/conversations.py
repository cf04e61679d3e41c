"""Conversations that a chat model holds with itself: it writes the user's turns as well as its answers.

After the opening of its template a chat model writes what a user would say, so no data set is needed (Xu et al. 2024,
"Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing").
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhlm.decoding.chat import TurnIds
from fedhlm.progress import progress

QUESTION_MAX: Final = 64  # tokens of a user's turn
GREEDY_EVERY: Final = 4  # one row of so many has greedy answers


class Rows(NamedTuple):
    """Ids (rows, length), and whether each is of the text (rows, length); the other ids are the template's."""

    ids: NDArray[np.int64]
    written: NDArray[np.bool_]


@torch.inference_mode()
def converse(
    model: Any,
    turns: TurnIds,
    end_ids: Sequence[int],
    *,
    rows: int,
    length: int,
    seed: int,
    temperature: float,
    vocabulary: int,
    read: Callable[[int, Tensor], None] | None = None,
) -> Rows:
    """Let a model write `rows` conversations of `length` tokens, one turn after the other.

    Users' turns are drawn at temperature 1, and answers at `temperature`; one of GREEDY_EVERY rows has greedy answers.
    Ids are below `vocabulary`. `read` is called with each place from the opening's last one on, but for the last, and
    the logits (rows, `vocabulary`) after it.
    """
    generator = torch.Generator().manual_seed(seed)
    opening = len(turns.opening)
    ids = np.zeros((rows, length), np.int64)
    written = np.zeros((rows, length), np.bool_)
    ids[:, :opening] = turns.opening
    asking = np.ones(rows, np.bool_)
    begins = np.full(rows, opening)  # of the turn
    forced: list[deque[int]] = [deque() for _ in range(rows)]
    cache, fed = None, torch.from_numpy(ids[:, :opening])
    with progress(f"tokens of {rows} conversations", length - opening) as ended:
        for at in range(opening, length):
            output = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits = output.logits[:, -1, :vocabulary].float()
            if read is not None:
                read(at - 1, logits)
            drawn = _draw(logits, asking, temperature, generator)
            for row, token in enumerate(drawn.tolist()):
                ending = token in end_ids or (asking[row] and at - begins[row] >= QUESTION_MAX)
                if not forced[row] and ending:
                    forced[row].extend(turns.answer if asking[row] else turns.question)
                    asking[row] = not asking[row]
                    begins[row] = at + len(forced[row])
                    written[row, at] = token == forced[row][0]
                elif not forced[row]:
                    written[row, at] = True
                ids[row, at] = forced[row].popleft() if forced[row] else token
            fed = torch.from_numpy(ids[:, at : at + 1])
            ended()
    return Rows(ids, written)


def _draw(logits: Tensor, asking: NDArray[np.bool_], temperature: float, generator: torch.Generator) -> Tensor:
    """Draw a token of each row of `logits` (rows, V)."""
    rows = len(asking)
    greedy = torch.from_numpy(~asking & (np.arange(rows) % GREEDY_EVERY == 0))
    temperatures = torch.from_numpy(np.where(asking, 1.0, temperature)).float()
    # The exponential race draws from the softmax without normalising it.
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    sampled: Tensor = (logits / temperatures[:, None] - noise).argmax(-1)
    chosen: Tensor = torch.where(greedy, logits.argmax(-1), sampled)
    return chosen
