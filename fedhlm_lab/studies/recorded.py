"""Record what both models say along the LLM's own texts, so that policies can be compared offline in seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import Decoder, DecoderInput
from fedhlm.decoding.uncertainty import closed_form
from fedhlm.process.files import replace_file
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.studies.compare import Oracle, StudyTask


class RecordedText(msgspec.Struct, frozen=True, kw_only=True):
    """The LLM's text of one task, with the draft and the doubt of the SLM before each of its tokens.

    Attributes:
        prompt: number of prompt tokens.
        target: the LLM's ids, shape (n,).
        drafts: the SLM's ids, shape (n,).
        doubts: the doubt of each draft, in [0, 1], shape (n,).
        right: for a topic question, whether the LLM's and the SLM's answers are right.
    """

    prompt: int
    target: list[int]
    drafts: list[int]
    doubts: list[float]
    right: tuple[bool, bool] | None = None

    @property
    def harms(self) -> NDArray[np.float64]:
        """1 where the LLM writes another token than the draft, else 0; shape (n,) float64."""
        return np.not_equal(self.target, self.drafts).astype(np.float64)


def recorded(task: StudyTask, large: Oracle, small: Decoder, coupling: str) -> RecordedText:
    """Record one task. The SLM drafts with the same noise, once for each position of the LLM's text."""
    target = large.write(task, COUPLINGS[coupling].alone)
    sampling = Sampling(task.sampling.seed, task.sampling.temperature, task.sampling.top_p, coupling)
    ids = [*task.prompt, *target[:-1]]
    logits = small.forward([DecoderInput(small.empty_cache(), ids, len(target))])[0].logits  # (n, V)
    drafts = [
        COUPLINGS[coupling].draft(row, sampling, place)[0] for place, row in enumerate(logits, start=len(task.prompt))
    ]
    doubts = [closed_form(row, token) for row, token in zip(logits, drafts, strict=True)]
    right = None
    if task.topic:
        answers = (large.decoder.tokenizer.decode(text).strip() for text in (target, drafts))
        wrote, drafted = (answer == task.topic for answer in answers)
        right = wrote, drafted
    return RecordedText(prompt=len(task.prompt), target=target, drafts=drafts, doubts=doubts, right=right)


def load_or_record(
    file: Path,
    tasks: Sequence[StudyTask],
    large: Oracle,
    small: Decoder,
    coupling: str,
    ended: Callable[[], object] = lambda: None,
) -> list[RecordedText]:
    """Return the recorded texts of the tasks: from the file if it holds them, else computed and written there."""
    if file.exists():
        kept = msgspec.json.decode(file.read_bytes(), type=list[RecordedText])
        if [text.prompt for text in kept] == [len(task.prompt) for task in tasks]:
            return kept
    found = []
    for task in tasks:
        found.append(recorded(task, large, small, coupling))
        ended()
    replace_file(file, msgspec.json.encode(found))
    return found
