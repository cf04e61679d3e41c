"""The large model's continuations of news titles: the text from which the small model learns to imitate it.

Half are greedy and half are sampled at DRAFT_TEMPERATURE. Agreement is later measured under these two laws.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from fedhlm.errors import DataMissing
from fedhlm_zoo.corpus import Article
from fedhlm_zoo.export import load_torch
from fedhlm_zoo.generate import Choose, continue_prompts
from fedhlm_zoo.train import END_ID, Pack, faster_precision

DRAFT_TEMPERATURE: Final = 0.8
LONGEST: Final = 96
# Tokens of a typical document, title included.
TYPICAL: Final = 60


def write_drafts(
    model_dir: Path, tokenizer: Tokenizer, articles: list[Article], *, tokens: int, seed: int = 17
) -> Pack:
    """Continue titles with the model in `model_dir` until about `tokens` tokens are written, titles included.

    Raises:
        DataMissing: no article has a title.
        ModelError: `model_dir` is no causal LM.
    """
    titles = sorted({a.title for a in articles if a.title})
    if not titles:
        raise DataMissing("no article has a title to continue")
    order = np.random.default_rng(seed).permutation(len(titles))[: -(-tokens // TYPICAL)]
    encoded = tokenizer.encode_batch([f"{titles[i]}\n" for i in order], add_special_tokens=False)
    prompts = [[END_ID, *e.ids] for e in encoded]
    # The output is only training text, so half precision will do.
    model = load_torch(model_dir, dtype=faster_precision())
    choose = half_greedy(torch.Generator().manual_seed(seed))
    endings = continue_prompts(model, prompts, tokens=LONGEST, end_id=END_ID, choose=choose, batch=256)
    documents = [[*p, *(i for i in ending if i != END_ID)] for p, ending in zip(prompts, endings, strict=True)]
    lengths = np.array([0, *map(len, documents)])
    ids = np.concatenate([np.array(d, np.uint16) for d in documents])
    return Pack(ids, np.ones(len(ids), np.float16), np.cumsum(lengths))


def half_greedy(generator: torch.Generator) -> Choose:
    """Choose greedily for prompts with even numbers, and by sampling at DRAFT_TEMPERATURE for the others."""

    def choose(logits: Tensor, rows: NDArray[np.int64], _step: int) -> Tensor:
        # The exponential race draws from the softmax without normalising it.
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        sampled: Tensor = (logits / DRAFT_TEMPERATURE - noise).argmax(-1)
        greedy: Tensor = logits.argmax(-1)
        return torch.where(torch.from_numpy(rows % 2 == 0), greedy, sampled)

    return choose


def mix(real: Pack, drafts: Pack, *, tokens: int, seed: int = 19) -> Pack:
    """Pick about `tokens` tokens, half from random documents of each; documents repeat if a pack holds fewer."""
    parts = [_take(pack, tokens // 2, np.random.default_rng((seed, i))) for i, pack in enumerate((real, drafts))]
    lengths = [np.diff(p.starts) for p in parts]
    return Pack(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.weights for p in parts]),
        np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
    )


def _take(pack: Pack, tokens: int, rng: Any) -> Pack:
    lengths = np.diff(pack.starts)
    rounds = -(-tokens // len(pack.ids))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(rounds)])
    order = order[: int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1]
    spans = [slice(pack.starts[d], pack.starts[d + 1]) for d in order]
    starts = np.concatenate([[0], np.cumsum(lengths[order])])
    return Pack(np.concatenate([pack.ids[s] for s in spans]), np.concatenate([pack.weights[s] for s in spans]), starts)
