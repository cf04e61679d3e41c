"""What the texts of an experiment are asked for: a workload on news items, or the prompts of any file.

A file has one prompt a line. A line that begins with `{` is a JSON object with the key `prompt`, whose text may have
several lines. Blank lines are skipped.
"""

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from fedhlm.answering import Offer
from fedhlm.decoding.text import encode_prompt
from fedhlm.errors import ConfigError, DataMissing, FedhlmError
from fedhlm_lab.papers.pair import LabPair, decoder_of
from fedhlm_lab.papers.requests import source_of
from fedhlm_zoo.corpus import TOPIC_LINE, Article

CONTINUE: Final = "continue"
CHAT: Final = "chat"
WORKLOADS: Final[dict[str, Callable[[Article], str]]] = {
    CONTINUE: lambda article: f"{article.title}\n",
    "headline": lambda article: f"{article.text}\nHeadline:",
    "topic": lambda article: f"{article.body}{TOPIC_LINE}",
    CHAT: lambda article: f"Write a headline for this news item:\n\n{article.text}",
}
"""The text of a news item's prompt. A chat is written with the chat template of the LLM."""


class _PromptLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str


_line: Final = msgspec.json.Decoder(_PromptLine)


class PromptChoice(NamedTuple):
    """Where prompts come from: a file, or news items under a workload."""

    file: Path | None = None
    workload: str = CONTINUE


NEWS: Final = PromptChoice()


class LabPrompts(NamedTuple):
    """Prompts as ids, and what the report says of them."""

    source: str
    ids: Sequence[list[int]]


def read_prompts(file: Path) -> list[str]:
    """Read a file of prompts.

    Raises:
        DataMissing: it cannot be read, has no prompt, or a line is not one; its number is given.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as exc:
        raise DataMissing(f"--prompts must be a readable file (got {str(file)!r}: {exc.strerror})") from exc
    except UnicodeDecodeError as exc:
        raise DataMissing(f"--prompts must be UTF-8 text (got {str(file)!r}: byte {exc.start} is not)") from exc
    found = [_prompt(line, file.name, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataMissing(f"--prompts must have one prompt a line (got {str(file)!r}, which is empty)")
    return found


def _prompt(line: str, name: str, number: int) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        text = _line.decode(line).prompt
    except msgspec.DecodeError as exc:
        raise DataMissing(
            f"{name} line {number} must be a prompt, or a JSON object with the key prompt ({exc})"
        ) from exc
    if not text.strip():
        raise DataMissing(f"{name} line {number} has an empty prompt")
    return text


def prompts_of(chosen: PromptChoice, pair: LabPair, *, articles: int, needed: int, room: int) -> LabPrompts:
    """The prompts of an experiment: `needed` of them, each with `room` tokens of the context left for the text.

    News items are the first of at most `articles`, and must be enough. Prompts of a file take turns if they are fewer.

    Raises:
        ConfigError: the workload is unknown, or the texts leave no room for a prompt.
        DataMissing: the file cannot be used, or a prompt in it is too long.
        FedhlmError: there are too few items, or the LLM has no chat template.
    """
    if chosen.workload not in WORKLOADS:
        raise ConfigError("--workload", chosen.workload, f"one of {', '.join(WORKLOADS)}")
    context = decoder_of(pair).info.context
    if room >= context:
        raise ConfigError("tokens", room, f"below the {context} of the SLM's context")
    encode, limit = _encoder(chosen.workload, pair), context - room
    if chosen.file is None:
        source = source_of(articles)
        if len(source.articles) < needed:
            raise FedhlmError(f"the experiment must have {needed} articles (got {len(source.articles)})")
        ids = [encode(WORKLOADS[chosen.workload](article))[-limit:] for article in source.articles]
        return LabPrompts(source.name, ids if chosen.workload == CONTINUE else ids[:needed])
    texts = read_prompts(chosen.file)
    ids = [encode(text) for text in texts]
    for number, one in enumerate(ids, start=1):
        if len(one) > limit:
            raise DataMissing(
                f"prompt {number} of {chosen.file.name} must have at most {limit} tokens (got {len(one)})"
            )
    return LabPrompts(f"{len(ids)} prompts of {chosen.file.name}", list(islice(cycle(ids), max(needed, len(ids)))))


def _encoder(workload: str, pair: LabPair) -> Callable[[str], list[int]]:
    small = decoder_of(pair)
    if workload != CHAT:
        return lambda text: encode_prompt(small.tokenizer, text, small.info.bos_id)
    from fedhlm_doors.chat import ChatTemplate  # needs jinja2

    large, folder = pair.large_decoder, pair.llm_folder
    template = None if large is None or folder is None else ChatTemplate.of(Offer.of(large, folder, name="llm"))
    if template is None:
        raise FedhlmError("--workload chat must have an LLM with a chat template (got one without)")
    return lambda text: list(template.encode([{"role": "user", "content": text}]))
