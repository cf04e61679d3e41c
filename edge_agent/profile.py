"""A sample of an agent's drafts, from which the cloud tells which agents write about similar things; pure.

The sample has a few tokens from each of many prompts, because tokens of one prompt resemble each other and say little
about the agent. A prompt's tokens stay together and in order, because the cloud's cross-validation cuts the sample into
stretches.
"""

from collections import deque
from typing import Any, Final

import numpy as np

from fedhlm.peers.context_keys import DIMS

ROWS_MAX: Final = 256  # tokens per profile
PROMPT_ROWS: Final = 8  # tokens per prompt, at most
FRESH_MIN: Final = 64  # new tokens since the last profile that make another one worth its bytes


class PromptSample:
    """A reservoir sample of one prompt's drafts: every position is kept with equal probability."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._positions = 0
        self._last = -1
        self._rows: dict[int, tuple[bytes, float]] = {}

    def see(self, position: int, key: bytes, uncertainty: float) -> None:
        """Add a draft, or replace a rolled-back one at the same position. A draft without a key is ignored."""
        if len(key) != DIMS:
            return
        if position > self._last:
            self._last = position
            self._positions += 1
            if len(self._rows) == PROMPT_ROWS:
                place = int(self._rng.integers(self._positions))
                if place >= PROMPT_ROWS:
                    return
                del self._rows[sorted(self._rows)[place]]
            self._rows[position] = (key, uncertainty)
        elif position in self._rows:
            self._rows[position] = (key, uncertainty)

    @property
    def rows(self) -> list[tuple[bytes, float]]:
        """The kept keys and doubts, in order of position."""
        return [row for _, row in sorted(self._rows.items())]


class Sampler:
    """The samples of the latest prompts, at most ROWS_MAX tokens. `rng` chooses among a prompt's tokens.

    Older prompts are dropped, because prompts change over time, and an agent's cluster should follow.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._prompts: deque[list[tuple[bytes, float]]] = deque()
        self._fresh = 0

    @property
    def due(self) -> bool:
        """Whether FRESH_MIN tokens have arrived since the last profile."""
        return self._fresh >= FRESH_MIN

    def begin(self) -> PromptSample:
        """Begin the sample of a prompt. Pass it to `end` when the prompt is answered."""
        return PromptSample(self._rng)

    def end(self, sample: PromptSample) -> None:
        """Add a prompt's sample. The oldest prompts make room."""
        rows = sample.rows
        if not rows:
            return
        self._prompts.append(rows)
        self._fresh += len(rows)
        while sum(len(rows) for rows in self._prompts) > ROWS_MAX:
            self._prompts.popleft()

    def take(self) -> dict[str, Any]:
        """The fields of a `Profile`: `dims`, `keys` (n * dims int8) and `uncertainties` (n uint8, doubt times 255)."""
        self._fresh = 0
        rows = [row for prompt in self._prompts for row in prompt]
        doubts = np.clip([doubt for _, doubt in rows], 0.0, 1.0)  # (n,) float64
        return {
            "dims": DIMS,
            "keys": b"".join(key for key, _ in rows),
            "uncertainties": np.rint(255.0 * doubts).astype(np.uint8).tobytes(),  # (n,) uint8
        }
