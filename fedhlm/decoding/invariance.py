"""Whether a model's logits depend on how ids are cut into calls.

A text is exactly the target's only if they do not: the cloud cuts it into blocks and batches that the target alone
would not use.
"""

from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from fedhlm.decoding.decoder import DecoderInput, ModelInfo
from fedhlm.decoding.gguf import SUFFIX
from fedhlm.decoding.models import LoadedModel

LENGTH: Final = 24
TOLERANCE: Final = 0.02  # of a logit; rounding of float32 stays below 0.001, dynamic int8 reaches some tenths
# What to do about a model whose logits depend on the size of a block, by its quantisation.
_REMEDIES: Final = {
    "int8-dynamic": "quantise it with `fedhlm models quantise --mode weights-int8`",
    "bf16": "set cloud.dtype to float32",
}
_CUTS: Final = (0, 1, 2, 10, 13, LENGTH)


def steadier(info: ModelInfo) -> str:
    """What makes a model of this kind write the same whatever the blocks."""
    if any(Path(name).suffix.lower() == SUFFIX for name in info.files):
        return "take a GGUF file in Q8_0, Q5_1, Q4_1 or Q4_0"
    return _REMEDIES.get(info.quantisation, "use it in fp32")


def block_difference(model: LoadedModel) -> float:
    """Return the largest difference of a logit between one call, several calls, and a batch with a shorter text.

    The ids are random, and always the same for a size of the vocabulary. It takes seven calls of at most LENGTH ids.
    """
    length = min(LENGTH, model.info.context)
    ids = np.random.default_rng(0).integers(0, model.vocabulary.size, length).tolist()
    whole = DecoderInput(model.empty_cache(), ids)
    expected = model.forward([whole])[0].logits
    short = DecoderInput(model.empty_cache(), ids[: length // 2])
    worst = float(np.abs(model.forward([short, whole])[1].logits - expected).max())
    cache = model.empty_cache()
    for begin, end in pairwise(sorted({min(cut, length) for cut in _CUTS})):
        result = model.forward([DecoderInput(cache, ids[begin:end])])[0]
        worst = max(worst, float(np.abs(result.logits - expected[begin:end]).max()))
        cache = result.cache
    return worst
