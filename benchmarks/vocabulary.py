"""What a draw, a doubt and a draft law cost for a large vocabulary, against a smaller one in the same run.

Logits are random, with a few likely tokens. Times are those of the processor, and the fastest of some rounds. Run:
python benchmarks/vocabulary.py [--rounds 10]
"""

import json
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.uncertainty import closed_form
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.studies.command_line import COUNT, Parser

SIZES = (49_152, 262_144)  # of SmolLM2 and of Gemma 3
POSITION = 3


def logits_of(size: int) -> NDArray[np.float32]:
    """Logits of a law with 20 likely tokens, (size,)."""
    drawn = np.random.default_rng(0).normal(size=size) * 2.5
    drawn[:20] += 12.0
    return drawn.astype(np.float32)


def works(logits: NDArray[np.float32]) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    plain = Sampling(seed=5, temperature=0.8)
    found: dict[str, Callable[[], Any]] = {"doubt": lambda: closed_form(logits, POSITION)}
    for name in ("gumbel", "lattice", "full"):
        coupling = COUPLINGS[name]
        draft = coupling.draft(logits, plain, POSITION)
        found[f"draft {name}"] = lambda coupling=coupling: coupling.draft(logits, plain, POSITION)
        found[f"settle {name}"] = lambda coupling=coupling, draft=draft: coupling.settle(
            logits, plain, POSITION, draft.token, draft.law
        )
    for name, few in (("top_p 0.9", {"top_p": 0.9}), ("top_k 40", {"top_k": 40})):
        cut = Sampling(seed=5, temperature=0.8, **few)
        found[f"draft gumbel, {name}"] = lambda cut=cut: COUPLINGS["gumbel"].draft(logits, cut, POSITION)
    return found


def main() -> None:
    """Measure and print one line of JSON for each work."""
    parser = Parser("vocabulary.py", __doc__)
    parser.add_argument("--rounds", type=COUNT, default=10)
    rounds = parser.parse_args().rounds
    measured = {size: works(logits_of(size)) for size in SIZES}
    small, large = SIZES
    for name in measured[small]:
        fastest = dict.fromkeys(SIZES, float("inf"))
        for _ in range(rounds):
            for size in SIZES:  # in turn, so that both meet the same load
                began_s = process_time()
                measured[size][name]()
                fastest[size] = min(fastest[size], process_time() - began_s)
        shown = {f"ms at {size}": round(1000.0 * fastest[size], 3) for size in SIZES}
        print(json.dumps({"work": name, **shown, "ratio": round(fastest[large] / fastest[small], 2)}))


if __name__ == "__main__":
    main()
