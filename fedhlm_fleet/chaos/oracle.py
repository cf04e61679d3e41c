"""The oracle of a chaos run: a token settled by the cloud must be the LLM's token, an unverified one the SLM's draft.

With shared noise (couplings `gumbel` and `greedy`) both are functions of the seed, the position and the committed text.
The regret of a token is the distance of its perturbed score from the best one; rounding makes it small, but not zero.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np

from fedhlm import choices
from fedhlm.decoding.alone import Alone
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import DecoderInput
from fedhlm.decoding.models import load_model
from fedhlm.decoding.sampling import Logits, gumbel, scores
from fedhlm.decoding.translated import in_ids_of
from fedhlm.protocol.messages import Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Generation
from fedhlm_fleet.chaos.invariants import BrokenInvariant, RequestStory

# Another order of fp32 summation changes a logit by at most 1e-4 here. The SLM quantises its activations over all
# tokens of a call, so the device's division of its text into calls changes its logits by some hundredths.
CLOUD_REGRET: Final = 0.01
DRAFT_REGRET: Final = 0.5
BUDGET_ERRORS: Final = 4.0  # standard errors


class OracleModel(Protocol):
    """A language model with the methods that the oracle needs."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids."""

    def after(self, prompt: Sequence[int], ids: Sequence[int]) -> Sequence[Logits]:
        """Return len(ids) + 1 rows of logits: after the prompt, and after each id."""


class FolderModel(Alone):
    """A model folder; `steps` feeds the ids after the prompt one by one, as a device does.

    `target` is `agent.target_tokenizer` for the model of a device.

    Raises:
        ModelError: the folder cannot be used.
    """

    def __init__(self, folder: Path, *, threads: int, steps: bool, target: str = "") -> None:
        super().__init__(in_ids_of(target, load_model(folder, threads=threads)))
        self._steps = steps

    def after(self, prompt: Sequence[int], ids: Sequence[int]) -> Sequence[Logits]:
        """See `OracleModel.after`."""
        pieces = [[*prompt], *([i] for i in ids)] if self._steps else [[*prompt, *ids]]
        cache, rows = self.decoder.empty_cache(), []
        for piece in pieces:
            result = self.decoder.forward([DecoderInput(cache, piece)])[0]
            cache = result.cache
            rows += [result.logits[-1]] if self._steps else [*result.logits[len(prompt) - 1 :]]
        return rows


def perturbed(logits: Logits, sampling: Sampling, position: int) -> Logits:
    """Return the scores whose maximum is the emitted token; shape (V,), -inf for tokens that a filter removes."""
    wide = np.asarray(logits, np.float64)
    if sampling.temperature == 0.0 or COUPLINGS[sampling.coupling].greedy:
        return wide
    return scores(wide, sampling) + gumbel(sampling.seed, position, wide.size)


def regret(logits: Logits, sampling: Sampling, position: int, token: int) -> float:
    """Return how far a token's perturbed score is below the best one; 0 for the best token itself."""
    rated = perturbed(logits, sampling, position)
    return float(rated.max() - rated[token])


class TokenCheck(NamedTuple):
    """The check of the tokens of one source: the model whose tokens they must be, and the allowed regret."""

    rule: str
    model: str
    regret: float


CLOUD: Final = TokenCheck("oracle", "llm", CLOUD_REGRET)
DRAFT: Final = TokenCheck("draft", "slm", DRAFT_REGRET)

Checks = Mapping[str, TokenCheck | None]
"""The check for the tokens of each source; None: they cannot be checked. Tokens of other sources may not occur."""


def checks_of(generation: Generation) -> Checks:
    """Return the checks that follow from a preset."""
    shared, asked = COUPLINGS[generation.coupling].shared, choices.PEERS[generation.peers].asked
    cloud = CLOUD if shared else None
    # With peers, a device may commit another token than its own draft.
    draft = DRAFT if shared and not asked else None
    if choices.GATES[generation.gate].verifies_all and not asked:
        return {"cloud": cloud, "unverified": draft}
    return {"cloud": cloud, "unverified": draft, "local": draft, "peer": None, "neighbour": None}


@dataclass
class Judgement:
    """The result of comparing stories with the models. `regrets` has the largest regret of each rule.

    `errors` has for each agent how many tokens the gate kept that the LLM would not have written, and how many tokens
    were heard.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    unjudged: int = 0
    ties: int = 0
    regrets: dict[str, float] = field(default_factory=dict)
    errors: dict[str, tuple[int, int]] = field(default_factory=dict)
    violations: list[BrokenInvariant] = field(default_factory=list)


def judge(stories: Iterable[RequestStory], models: Mapping[str, OracleModel], checks: Checks) -> Judgement:
    """Compare every heard token with the model of its source, and every text with its ids.

    `models` has the models that the checks name, and "llm". The tokens behind a hole depend on the lost ones, so they
    are judged only if all tokens of the story are from the cloud.
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
                break  # the tokens that follow depend on it
    _count_errors(story, prompt, ids, models["llm"], total)
    if not story.torn and story.finish is not None and story.text != models["llm"].decode(ids):
        total.violations.append(BrokenInvariant("text", who, f"{story.text!r} is not the text of its ids"))


def _count_errors(
    story: RequestStory, prompt: Sequence[int], ids: Sequence[int], llm: OracleModel, total: Judgement
) -> None:
    kept = [p for p, token in story.tokens.items() if p < len(ids) and SOURCES[token.source].kept]
    rows = llm.after(prompt, ids) if kept and COUPLINGS[story.sampling.coupling].shared else []
    wrong = sum(regret(rows[p], story.sampling, len(prompt) + p, ids[p]) > CLOUD_REGRET for p in kept) if rows else 0
    before = total.errors.get(story.agent, (0, 0))
    total.errors[story.agent] = (before[0] + wrong, before[1] + len(ids))


def over_budget(judgement: Judgement, budget: float) -> list[BrokenInvariant]:
    """Return the agents whose kept tokens were wrong more often than a budget allows, by BUDGET_ERRORS or more."""
    found = []
    for agent, (wrong, tokens) in sorted(judgement.errors.items()):
        allowed = budget * tokens + BUDGET_ERRORS * math.sqrt(budget * tokens)
        if wrong > allowed:
            text = f"wrong tokens must be at most {allowed:.0f} of {tokens} (got {wrong})"
            found.append(BrokenInvariant("budget", agent, text))
    return found


def _filled(story: RequestStory, prompt: Sequence[int], llm: OracleModel) -> list[int]:
    """Return the ids up to the first hole, or all ids if the holes can be filled."""
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
