"""Requests of one token each, the topic of a news article, dealt out over clients and rounds.

AG News is not part of the project. Where FEDHLM_DATA names no folder with it, the 200 shipped items are used, and every
report says so.
"""

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from fedhlm.decoding.models import LoadedModel
from fedhlm.decoding.text import encode_prompt
from fedhlm_lab.papers.laws import LawPrompt
from fedhlm_zoo.corpus import TOPIC_LINE, Article, find_data, load_ag_news
from fedhlm_zoo.partition import dirichlet_partition
from fedhlm_zoo.prompts import load_items

ORDER_SEED: Final = 5  # the order of the test split in all studies
SHIPPED: Final = "200 items that ship with the project"
AG_NEWS: Final = "AG News, test split"


class LabRequest(NamedTuple):
    """One request: the number of its article, and its seed."""

    article: int
    seed: int


class LabSource(NamedTuple):
    """Articles, and where they come from."""

    name: str
    articles: Sequence[Article]


def source_of(articles: int) -> LabSource:
    """At most so many articles: of AG News if FEDHLM_DATA (or ./data) has it, else the shipped items."""
    if find_data(None) is None:
        return LabSource(SHIPPED, load_items()[:articles])
    found = load_ag_news("test")
    random.Random(ORDER_SEED).shuffle(found)
    return LabSource(AG_NEWS, found[:articles])


def topic_prompts(articles: Sequence[Article], decoder: LoadedModel) -> list[LawPrompt]:
    """The prompts that ask for the topic; of a long article the end, so that a token fits behind."""
    room = decoder.info.context - 1
    texts = [encode_prompt(decoder.tokenizer, a.body + TOPIC_LINE, decoder.info.bos_id) for a in articles]
    return [LawPrompt(tuple(ids[-room:])) for ids in texts]


def text_prompts(articles: Sequence[Article], decoder: LoadedModel, rows: int) -> list[LawPrompt]:
    """The articles themselves, with the laws before each of `rows` tokens, where they are long enough."""
    room = decoder.info.context - 1
    texts = [encode_prompt(decoder.tokenizer, a.body, decoder.info.bos_id)[:room] for a in articles]
    return [LawPrompt(tuple(ids), rows) for ids in texts if len(ids) > rows + 8]


def asked(count: int, articles: int, seed: int) -> list[LabRequest]:
    """So many requests. The articles take turns, and each request has a seed of its own."""
    return [LabRequest(i % articles, seed * 1_000_003 + i) for i in range(count)]


def dealt(
    requests: Sequence[LabRequest], topics: Sequence[str], *, clients: int, rounds: int, alpha: float, seed: int
) -> list[list[list[LabRequest]]]:
    """Deal requests out: of each round, of each client, its requests. Shares of topics are Dirichlet(alpha)."""
    split = dirichlet_partition([topics[r.article] for r in requests], clients, alpha, seed)
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.array(part, np.int64)) for part in split]
    parts = [np.array_split(part, rounds) for part in shuffled]
    return [[[requests[i] for i in mine[number]] for mine in parts] for number in range(rounds)]
