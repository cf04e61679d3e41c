"""Continue many prompts at once with a torch model.

Prompts of one batch have the same length, so nothing is padded and every row gets the logits that it would get alone.
Finished rows leave the batch.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhlm.progress import progress

# choose(logits (rows, V), prompt numbers (rows,), step) -> next ids (rows,)
Choose = Callable[[Tensor, NDArray[np.int64], int], Tensor]


def continue_prompts(
    model: Any, prompts: Sequence[Sequence[int]], *, tokens: int, end_id: int, choose: Choose, batch: int = 128
) -> list[list[int]]:
    """Continue every prompt by up to `tokens` ids.

    Returns:
        The new ids of each prompt, in the order of `prompts`; a continuation that ended has `end_id` as its last id.
    """
    continuations: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with progress("texts written", len(prompts)) as ended:
        for _, group in groupby(order, key=lambda i: len(prompts[i])):
            numbers = list(group)
            for begin in range(0, len(numbers), batch):
                rows = np.array(numbers[begin : begin + batch])
                _continue_batch(model, prompts, rows, continuations, tokens=tokens, end_id=end_id, choose=choose)
                for _row in rows:
                    ended()
    return continuations


@torch.inference_mode()
def _continue_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rows: NDArray[np.int64],
    continuations: list[list[int]],
    *,
    tokens: int,
    end_id: int,
    choose: Choose,
) -> None:
    fed = torch.tensor([list(prompts[r]) for r in rows])  # (rows, length)
    cache = None
    for step in range(tokens):
        output = model(fed, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chosen = choose(output.logits[:, -1].float(), rows, step)  # (rows,)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            continuations[row].append(token)
        alive = torch.nonzero(chosen != end_id)[:, 0]
        if not len(alive):
            return
        if len(alive) < len(rows):
            cache.batch_select_indices(alive)
            rows, chosen = rows[alive.numpy()], chosen[alive]
        fed = chosen[:, None]
