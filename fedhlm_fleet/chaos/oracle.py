"""What each token must be: the target's own where the cloud settled it, the small model's draft where nobody did.

With shared noise (couplings `gumbel` and `greedy`) both are functions of seed, position and the committed text before
them. A token's regret is how far its perturbed score stays behind the best one; rounding makes it small, not zero.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np

from fedhlm import choices
from fedhlm.decoding.alone import Alone
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import Decoder, DecoderInput
from fedhlm.decoding.sampling import Logits, gumbel, scores
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Generation
from fedhlm_fleet.chaos.invariants import BrokenInvariant, RequestStory

# fp32 in another order of summation moves a logit by 1e-4 at most here. The SLM quantises its activations over all
# tokens of a call, so how the device cut its text into calls moves its logits by some hundredths.
CLOUD_REGRET: Final = 0.01
DRAFT_REGRET: Final = 0.5


class OracleModel(Protocol):
    """A language model as the oracle needs it."""

    def encode(self, text: str) -> list[int]:
        """Prompt ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids."""

    def after(self, prompt: Sequence[int], ids: Sequence[int]) -> Sequence[Logits]:
        """len(ids) + 1 rows of logits: after the prompt, and after each id."""


class FolderModel(Alone):
    """A model folder; `steps` feeds the ids after the prompt one by one, as a device does.

    Raises:
        ModelError: the folder cannot be used.
    """

    def __init__(self, folder: Path, *, threads: int, steps: bool) -> None:
        super().__init__(Decoder.load(folder, threads=threads))
        self._steps = steps

    def after(self, prompt: Sequence[int], ids: Sequence[int]) -> Sequence[Logits]:
        """See `Model.after`."""
        pieces = [[*prompt], *([i] for i in ids)] if self._steps else [[*prompt, *ids]]
        cache, rows = self.decoder.empty_cache(), []
        for piece in pieces:
            result = self.decoder.forward([DecoderInput(cache, piece)])[0]
            cache = result.cache
            rows += [result.logits[-1]] if self._steps else [*result.logits[len(prompt) - 1 :]]
        return rows


def perturbed(logits: Logits, sampling: Sampling, position: int) -> Logits:
    """Scores of which the largest is the emitted token; shape (V,), -inf where top-p excludes."""
    wide = np.asarray(logits, np.float64)
    if sampling.temperature == 0.0 or COUPLINGS[sampling.coupling].greedy:
        return wide
    return scores(wide, sampling.temperature, sampling.top_p) + gumbel(sampling.seed, position, wide.size)


def regret(logits: Logits, sampling: Sampling, position: int, token: int) -> float:
    """How much better the best token's perturbed score is; 0 for the best itself."""
    rated = perturbed(logits, sampling, position)
    return float(rated.max() - rated[token])


class TokenCheck(NamedTuple):
    """Tokens of one source: whose they must be, and the regret that rounding may cause."""

    rule: str
    model: str
    regret: float


CLOUD: Final = TokenCheck("oracle", "llm", CLOUD_REGRET)
DRAFT: Final = TokenCheck("draft", "slm", DRAFT_REGRET)

Checks = Mapping[str, TokenCheck | None]
"""What tokens of each source must be; None: nothing can be said. A source that is not there may not occur."""


def checks_of(generation: Generation) -> Checks:
    """What a preset promises of its tokens."""
    shared, asked = COUPLINGS[generation.coupling].shared, choices.PEERS[generation.peers].asked
    cloud = CLOUD if shared else None
    # With peers a device may hold another token than its own draft.
    draft = DRAFT if shared and not asked else None
    if choices.GATES[generation.gate].verifies_all and not asked:
        return {"cloud": cloud, "unverified": draft}
    return {"cloud": cloud, "unverified": draft, "local": draft, "peer": None, "neighbour": None}


@dataclass
class Judgement:
    """What came of comparing stories with the models. `regrets` are the largest seen by rule."""

    tokens: dict[str, int] = field(default_factory=dict)
    unjudged: int = 0
    ties: int = 0
    regrets: dict[str, float] = field(default_factory=dict)
    violations: list[BrokenInvariant] = field(default_factory=list)


def judge(stories: Iterable[RequestStory], models: Mapping[str, OracleModel], checks: Checks) -> Judgement:
    """Compare every heard token with the model of its source. `models` has those that the checks name, and "llm".

    The texts are compared with their ids as well. The tokens behind a hole are judged only where all that was lost came from the cloud as well, since they depend on it.
    """
    total = Judgement()
    for story in stories:
        if story.tokens:
            _judge(story, models, checks, total)
    return total


def _judge(story: RequestStory, models: Mapping[str, OracleModel], checks: Checks, total: Judgement) -> None:
    prompt = models["llm"].encode(story.prompt)
    ids = _filled(story, prompt, models["llm"])
    total.unjudged += sum(position >= len(ids) for position in story.tokens)
    who = f"{story.agent} {story.request}"
    sources = {story.tokens[p].source for p in range(len(ids)) if p in story.tokens}
    for source in sorted(sources):
        places = [p for p in range(len(ids)) if p in story.tokens and story.tokens[p].source == source]
        if source not in checks:
            total.violations.append(BrokenInvariant("source", who, f"tokens from {source!r} under this preset"))
            continue
        check = checks[source]
        if check is None:
            total.unjudged += len(places)
            continue
        rows = models[check.model].after(prompt, ids)
        for position in places:
            behind = regret(rows[position], story.sampling, len(prompt) + position, ids[position])
            total.tokens[source] = total.tokens.get(source, 0) + 1
            total.ties += 0.0 < behind <= check.regret
            total.regrets[check.rule] = max(total.regrets.get(check.rule, 0.0), behind)
            if behind > check.regret:
                best = int(np.argmax(perturbed(rows[position], story.sampling, len(prompt) + position)))
                text = f"position {position}: {ids[position]} where {best} was due (regret {behind:.3g})"
                total.violations.append(BrokenInvariant(check.rule, who, text))
                break  # what follows depends on it
    if not story.torn and story.finish is not None and story.text != models["llm"].decode(ids):
        total.violations.append(BrokenInvariant("text", who, f"{story.text!r} is not the text of its ids"))


def _filled(story: RequestStory, prompt: Sequence[int], llm: OracleModel) -> list[int]:
    """The ids up to the first hole, or all of them with holes filled where that can be done."""
    ids: list[int] = []
    for position in range(story.length):
        if position in story.tokens:
            ids.append(story.tokens[position].token)
        elif story.only_from(frozenset({"cloud"})):
            last = llm.after(prompt, ids)[-1]
            ids.append(int(np.argmax(perturbed(last, story.sampling, len(prompt) + position))))
        else:
            break
    return ids
