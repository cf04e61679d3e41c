"""Measure a model on AG News or on other texts, and measure how well a small model predicts a large one.

A model is a torch directory or a model folder; both give the same figures up to rounding. Noise comes from
`fedhlm.decoding.sampling`, so acceptance is that of the running system. `in_ids_of` makes models of different
tokenizers comparable, as an agent does with `agent.target_tokenizer`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fedhlm.decoding.alone import Alone
from fedhlm.decoding.decoder import INFO_FILE, DecoderInput
from fedhlm.decoding.hub import begin_id, open_tokenizer
from fedhlm.decoding.models import LoadedModel, backend_of, load_model
from fedhlm.decoding.sampling import gumbel, perturbed_argmax, scores
from fedhlm.decoding.spoken import Spoken
from fedhlm.decoding.translated import Translated
from fedhlm.decoding.vocabulary import TOKENIZER_FILE, Vocabulary, vocabulary_of
from fedhlm.errors import ModelError
from fedhlm.progress import progress
from fedhlm.protocol.messages import Sampling
from fedhlm_zoo.corpus import TOPIC_LINE, TOPICS, Article

TEMPERATURE: Final = 0.8
CONTINUATION: Final = 64
PROMPT_IDS: Final = 24  # of a text's beginning that a target continues
RANKS: Final = 8  # of a draft's candidates that are told apart
COMPARED: Final = 8  # texts whose logits of both models are held at once
# Tokens per torch call; the logits of a call take 4 bytes * vocabulary each.
CALL_TOKENS: Final = 4096


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one model on `articles` labelled articles; perplexity is per token of title and text."""

    articles: int
    topic_accuracy: float
    tokens: int
    perplexity: float


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How well a draft model predicts a target's own continuations of `prompts` titles.

    `greedy` is the share of positions with equal argmax, on greedy continuations. `gumbel` is the share where both
    draw the same token with shared noise, on continuations at `temperature`. `ranks` are the shares there at which the
    target draws the draft model's first, second, ... candidate; the first is `gumbel`.
    """

    prompts: int
    greedy: float
    greedy_tokens: int
    gumbel: float
    gumbel_tokens: int
    temperature: float
    ranks: tuple[float, ...] = ()


class TextEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one model on `texts` texts, each up to the model's context; perplexity is per token."""

    texts: int
    tokens: int
    perplexity: float


class Likeness(msgspec.Struct, frozen=True, kw_only=True):
    """How near a model's laws are to a target's at the tokens of the same texts.

    `top1` is the share of positions with equal argmax. `kl` is the mean of KL(target || model), in nats.
    """

    tokens: int
    top1: float
    kl: float


class Model(Protocol):
    """What the measurements need from a model."""

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    context: int
    end_ids: tuple[int, ...]
    end_id: int  # the lowest of them, -1 if there is none
    begin: tuple[int, ...]  # the ids before the first of a text

    def loaded(self) -> LoadedModel:
        """The model as a part runs it."""
        ...

    def rows(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Number and logits (length, vocabulary.size) of every sequence, in any order."""
        ...

    def continuations(self, prompts: Sequence[Sequence[int]], *, tokens: int, temperature: float) -> list[list[int]]:
        """Up to `tokens` new ids per prompt, with the noise of seed = prompt number; ends with the end id."""
        ...


class EngineModel:
    """A model folder or a GGUF file, run as a part runs it: one sequence at a time."""

    def __init__(self, model: Path | LoadedModel, *, threads: int = 1, drafting: bool = False) -> None:
        loaded = load_model(model, threads=threads, drafting=drafting) if isinstance(model, Path) else model
        self._decoder = loaded
        self.tokenizer = self._decoder.tokenizer
        self.vocabulary = self._decoder.vocabulary
        self.context = self._decoder.info.context
        self.end_ids = self._decoder.info.eos_ids
        self.end_id = min(self.end_ids, default=-1)
        bos_id = self._decoder.info.bos_id
        self.begin: tuple[int, ...] = () if bos_id is None else (bos_id,)

    def loaded(self) -> LoadedModel:
        return self._decoder

    def rows(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        with progress("texts read", len(sequences)) as ended:
            for number, ids in enumerate(sequences):
                yield number, self._decoder.forward([DecoderInput(self._decoder.empty_cache(), ids)])[0].logits
                ended()

    def continuations(self, prompts: Sequence[Sequence[int]], *, tokens: int, temperature: float) -> list[list[int]]:
        alone = Alone(self._decoder)
        texts = []
        with progress("texts written", len(prompts)) as ended:
            for seed, prompt in enumerate(prompts):
                texts.append(alone.write(prompt, Sampling(seed, temperature), tokens))
                ended()
        return texts


class TorchModel:
    """A Hugging Face directory, run in batches of similar lengths."""

    def __init__(self, folder: Path, *, tokenizer: Path | None = None) -> None:
        from fedhlm_zoo.export import load_torch

        self._folder, self._model = folder, load_torch(folder)
        file = (tokenizer or folder) / TOKENIZER_FILE
        if not file.is_file():
            raise ModelError(f"{file} is missing: give the tokenizer's folder")
        self.tokenizer = open_tokenizer(file.parent)
        self.vocabulary = vocabulary_of(file.parent)
        self.context = int(self._model.config.max_position_embeddings)
        eos = self._model.config.eos_token_id
        self.end_ids: tuple[int, ...] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        self.end_id = min(self.end_ids, default=-1)
        bos_id = begin_id(file.parent, self._model.config.bos_token_id)
        self.begin: tuple[int, ...] = () if bos_id is None else (bos_id,)

    def loaded(self) -> LoadedModel:
        from fedhlm_zoo.torch_model import TorchDecoder

        return TorchDecoder(self._model, self._folder)

    def rows(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        import torch

        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        with progress("texts read", len(sequences)) as ended:
            while order:
                # The longest sequences come last, and as many of them as fit share one call of that width. The padding
                # is on the right, where the causal mask hides it.
                width = len(sequences[order[-1]])
                taken, order = order[-max(1, CALL_TOKENS // width) :], order[: -max(1, CALL_TOKENS // width)]
                ids = np.zeros((len(taken), width), np.int64)
                for row, number in enumerate(taken):
                    ids[row, : len(sequences[number])] = sequences[number]
                with torch.inference_mode():
                    logits: NDArray[np.float32] = self._model(torch.from_numpy(ids), use_cache=False).logits.numpy()[
                        ..., : self.vocabulary.size
                    ]
                for row, number in enumerate(taken):
                    yield number, logits[row, : len(sequences[number])]
                    ended()

    def continuations(self, prompts: Sequence[Sequence[int]], *, tokens: int, temperature: float) -> list[list[int]]:
        import torch

        from fedhlm_zoo.generate import continue_prompts

        def choose(logits: Any, rows: NDArray[np.int64], step: int) -> Any:
            values = zip(logits.numpy()[:, : self.vocabulary.size], rows.tolist(), strict=True)
            return torch.tensor([_draw(row, temperature, n, len(prompts[n]) + step) for row, n in values])

        return continue_prompts(self._model, prompts, tokens=tokens, end_id=self.end_id, choose=choose)


def open_model(folder: Path, *, tokenizer: Path | None = None, threads: int = 1) -> Model:
    """Open a model folder (it has a model.json), a GGUF file, or a Hugging Face directory.

    Raises:
        ModelError: neither.
    """
    if (folder / INFO_FILE).is_file() or backend_of(str(folder)) == "llama-cpp":
        return EngineModel(folder, threads=threads)
    return TorchModel(folder, tokenizer=tokenizer)


def in_ids_of(target: Model, model: Model) -> Model:
    """A model in the ids of a target, whose tokenizer may be another one; the model itself if the ids are the same.

    Raises:
        ModelError: a tokenizer cannot be translated.
    """
    if model.vocabulary == target.vocabulary:
        return model
    spoken = Spoken(target.tokenizer, target.vocabulary, next(iter(target.begin), None), target.end_ids)
    return EngineModel(Translated(model.loaded(), spoken))


def sample(articles: Sequence[Article], count: int | None, *, seed: int = 0) -> list[Article]:
    """Draw `count` articles without replacement, the same for the same seed; None takes all."""
    if count is None or count >= len(articles):
        return list(articles)
    order = np.random.default_rng(seed).permutation(len(articles))[:count]
    return [articles[i] for i in sorted(order.tolist())]


def evaluate(model: Model, articles: Sequence[Article]) -> Evaluation:
    """Measure topic accuracy (the likeliest topic name after ``Topic:``) and the perplexity of the bodies.

    Raises:
        ModelError: the tokenizer does not tell the four topic names apart by their first token.
    """
    topics = _topic_ids(model.tokenizer)
    bodies = model.tokenizer.encode_batch([a.body for a in articles], add_special_tokens=False)
    asked = model.tokenizer.encode(TOPIC_LINE, add_special_tokens=False).ids
    room = model.context - len(asked) - 1
    sequences = [[model.end_id, *e.ids[:room], *asked] for e in bodies]
    right, nll, tokens = 0, 0.0, 0
    for number, logits in model.rows(sequences):
        body = len(sequences[number]) - len(asked)  # the end-of-text id and the body
        right += TOPICS[int(np.argmax(logits[-1, topics]))] == articles[number].topic
        nll -= float(_log_laws(logits[: body - 1])[np.arange(body - 1), sequences[number][1:body]].sum())
        tokens += body - 1
    return Evaluation(
        articles=len(articles), topic_accuracy=right / len(articles), tokens=tokens, perplexity=math.exp(nll / tokens)
    )


def evaluate_texts(model: Model, texts: Sequence[str]) -> TextEvaluation:
    """Measure the perplexity of texts.

    Raises:
        ModelError: no text has two tokens.
    """
    nll, tokens = 0.0, 0
    sequences = sequences_of(model, texts)
    for number, logits in model.rows(sequences):
        after = sequences[number][1:]
        nll -= float(_log_laws(logits[:-1])[np.arange(len(after)), after].sum())
        tokens += len(after)
    return TextEvaluation(texts=len(sequences), tokens=tokens, perplexity=math.exp(nll / tokens))


def sequences_of(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Ids of the texts, up to the context of the model. Texts of one token are left out, as nothing predicts it.

    Raises:
        ModelError: no text is left.
    """
    encoded = model.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    sequences = [[*model.begin, *e.ids][: model.context] for e in encoded]
    if not (found := [ids for ids in sequences if len(ids) > 1]):
        raise ModelError("texts must have at least two tokens (got none that has)")
    return found


def likeness(model: Model, target: Model, texts: Sequence[str]) -> Likeness:
    """Compare the laws of two models at every token of the texts.

    Raises:
        ModelError: the ids of the two have different meanings, or no text has two tokens.
    """
    _same_ids(model, target)
    context = min(model.context, target.context)
    sequences = [ids[:context] for ids in sequences_of(target, texts)]
    same, kl, tokens = 0, 0.0, 0
    for begin in range(0, len(sequences), COMPARED):
        part = sequences[begin : begin + COMPARED]
        ours, theirs = dict(model.rows(part)), dict(target.rows(part))
        for number in range(len(part)):
            p, q = _log_laws(theirs[number]), _log_laws(ours[number])
            same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            kl += float((np.exp(p) * (p - q)).sum())
            tokens += len(p)
    return Likeness(tokens=tokens, top1=same / tokens, kl=kl / tokens)


def _log_laws(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Normalised log-probabilities, row by row."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _same_ids(draft: Model, target: Model) -> None:
    if draft.vocabulary != target.vocabulary:
        raise ModelError("draft and target have different vocabularies: translate the draft with in_ids_of")


def _topic_ids(tokenizer: Tokenizer) -> list[int]:
    ids = [tokenizer.encode(f" {topic}", add_special_tokens=False).ids[0] for topic in TOPICS]
    if len(set(ids)) != len(TOPICS):
        raise ModelError(f"first tokens of the topics {TOPICS} must be four different ones (got {ids})")
    return ids


def agreement(
    draft: Model,
    target: Model,
    articles: Sequence[Article],
    *,
    tokens: int = CONTINUATION,
    temperature: float = TEMPERATURE,
) -> Agreement:
    """Let `target` continue the titles, and count where `draft` would have written the same token.

    Raises:
        ModelError: the ids of the two have different meanings.
    """
    titles = [a.title or a.text.split("\n")[0] for a in articles]
    encoded = target.tokenizer.encode_batch([f"{t}\n" for t in titles], add_special_tokens=False)
    longest = min(draft.context, target.context) - tokens - 1
    prompts = [[target.end_id, *e.ids[:longest]] for e in encoded]
    return agreement_after(draft, target, prompts, tokens=tokens, temperature=temperature)


def text_agreement(
    draft: Model,
    target: Model,
    texts: Sequence[str],
    *,
    tokens: int = CONTINUATION,
    temperature: float = TEMPERATURE,
) -> Agreement:
    """Let `target` continue the beginnings of texts, as `agreement` does with titles.

    Raises:
        ModelError: as in `agreement`, or no text has two tokens.
    """
    longest = min(PROMPT_IDS, min(draft.context, target.context) - tokens)
    prompts = [ids[:longest] for ids in sequences_of(target, texts)]
    return agreement_after(draft, target, prompts, tokens=tokens, temperature=temperature)


def agreement_after(
    draft: Model, target: Model, prompts: list[list[int]], *, tokens: int, temperature: float
) -> Agreement:
    """Let `target` continue prompts, and count where `draft` would have written the same token.

    Raises:
        ModelError: the ids of the two have different meanings.
    """
    _same_ids(draft, target)
    greedy, greedy_tokens = _ranks(draft, target, prompts, tokens=tokens, temperature=0.0)
    drawn, drawn_tokens = _ranks(draft, target, prompts, tokens=tokens, temperature=temperature)
    return Agreement(
        prompts=len(prompts),
        greedy=greedy[0] / greedy_tokens,
        greedy_tokens=greedy_tokens,
        gumbel=drawn[0] / drawn_tokens,
        gumbel_tokens=drawn_tokens,
        temperature=temperature,
        ranks=tuple(count / drawn_tokens for count in drawn),
    )


def _ranks(
    draft: Model, target: Model, prompts: list[list[int]], *, tokens: int, temperature: float
) -> tuple[list[int], int]:
    """How often the target's token is the draft's first, second, ... candidate of RANKS, and the number of tokens."""
    continued = target.continuations(prompts, tokens=tokens, temperature=temperature)
    sequences = [prompt + ids[:-1] for prompt, ids in zip(prompts, continued, strict=True)]
    counts = [0] * RANKS
    for number, logits in draft.rows(sequences):
        begin = len(prompts[number])
        for step, token in enumerate(continued[number]):
            rank = _rank(logits[begin - 1 + step], token, temperature, number, begin + step)
            if rank < RANKS:
                counts[rank] += 1
    return counts, sum(map(len, continued))


def _rank(logits: NDArray[np.float32], token: int, temperature: float, seed: int, position: int) -> int:
    """How many tokens come before this one where the noise is that of the coupling; 0 if it is the draw."""
    if _draw(logits, temperature, seed, position) == token:
        return 0
    perturbed = logits.astype(np.float64)
    if temperature:
        perturbed = scores(logits, Sampling(seed, temperature)) + gumbel(seed, position, len(logits))
    return max(1, int((perturbed > perturbed[token]).sum()))


def _draw(logits: NDArray[np.float32], temperature: float, seed: int, position: int) -> int:
    if temperature == 0.0:
        return int(np.argmax(logits))
    return perturbed_argmax(scores(logits, Sampling(seed, temperature)), seed, position)
