"""The requests of the demo: which agent gets which request, and how the answers reach the view."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from fedhlm.bus.interface import Bus
from fedhlm.bus.party import Received
from fedhlm.client import Client
from fedhlm.errors import AskError, ConfigError, ProtocolError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Learned, Presence
from fedhlm_fleet.attendance import Attendance, Place
from fedhlm_fleet.demo.progress import Progress
from fedhlm_fleet.demo.report import Generated
from fedhlm_zoo.corpus import TOPIC_LINE, Article
from fedhlm_zoo.prompts import load_items

ANSWER_S: Final = 120.0


class Task(msgspec.Struct, frozen=True):
    """A future request: continue a title, or name the topic of a whole item."""

    kind: str
    text: str
    topic: str
    tokens: int
    temperature: float | None
    seed: int


def tasks_of(articles: tuple[Article, ...], tokens: int, first_seed: int = 0) -> Iterator[Task]:
    """Yield for each item the continuation of its title and, if it has a topic, the question for the topic."""
    seeds = itertools.count(first_seed)
    for article in articles:
        yield Task("continue", article.title + "\n", article.topic, tokens, None, next(seeds))
        if article.topic:
            yield Task("topic", article.body + TOPIC_LINE, article.topic, 1, 0.0, next(seeds))


def load_prompts(path: Path | None) -> tuple[Article, ...]:
    """Load news items from a .jsonl file, or titles from the lines of another file; without a path, the shipped items.

    Raises:
        DataMissing: a file of items cannot be read, or is empty.
        ConfigError: a text file cannot be read, or is empty.
    """
    if path is None or path.suffix in (".jsonl", ".json"):
        return load_items(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError("--prompts", str(path), "a readable UTF-8 text file", why=str(exc)) from exc
    titles = [line.strip() for line in lines if line.strip()]
    if not titles:
        raise ConfigError("--prompts", str(path), "at least one line of text")
    return tuple(Article(title, "", "") for title in titles)


class Asker:
    """Sends tasks to agents through the client, and passes the answers to the view; one request per agent at a time."""

    def __init__(self, bus: Bus, places: list[Place], progress: Progress, *, root: str) -> None:
        self.client = Client(bus, name="demo", root=root, hear=self._hear, away_s=ANSWER_S)
        self.places = places
        self.requests: list[Generated] = []
        self._progress = progress
        self._root = root
        self._attendance = Attendance()
        self._ready = asyncio.Event()

    async def wait_ready(self) -> None:
        """Wait until every agent is online and every edge sees the cloud."""
        await self.client.subscribe(
            *self._attendance.filters(self._root),
            topics.FL_STATE.name(self._root, cluster="+"),
            topics.CLOUD_FL_STATE.name(self._root),
        )
        await self._ready.wait()

    def _hear(self, received: Received) -> None:
        match received.message:
            case Presence() as state:
                self._attendance.hear(state, received.levels)
            case Learned() as state:
                try:
                    self._progress.learned(received.levels.get("cluster", ""), state)
                except ProtocolError:  # the curve is malformed; the view goes on without it
                    self.client.party.counters.add("refused_messages")
        if self._attendance.complete(self.places):
            self._ready.set()

    async def ask(self, place: Place, task: Task, preset: str | None) -> Generated:
        """Ask for one text and wait for its end; with None as preset, the agent uses the one of its configuration."""
        generated = Generated(
            agent=place.agent,
            task=task.kind,
            prompt=task.text,
            topic=task.topic,
            seed=task.seed,
            max_tokens=task.tokens,
            temperature=task.temperature,
        )
        self.requests.append(generated)
        answer = self.client.ask(
            place.agent,
            task.text,
            cluster=place.cluster,
            max_tokens=task.tokens,
            seed=task.seed,
            temperature=task.temperature,
            preset=preset,
            deadline_s=ANSWER_S,
        )
        async with answer:
            try:
                async for piece in answer:
                    generated.ids += piece.ids
                    generated.sources += piece.sources
                    generated.text += piece.text
                    self._progress.heard(generated)
            except AskError as exc:
                generated.finish, generated.error = "error", str(exc)
            else:
                generated.finish, generated.statistics = answer.result.finish, answer.result.statistics
        self._progress.finished(generated)
        return generated
