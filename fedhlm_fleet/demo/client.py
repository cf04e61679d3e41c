"""The demo's client: what is asked of whom, and the one who asks, over the bus, as any client would."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from fedhlm.bus.party import Party
from fedhlm.errors import ConfigError, ProtocolError
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Learned, Output, Presence, Prompt
from fedhlm_fleet.demo.progress import Progress
from fedhlm_fleet.demo.report import Generated
from fedhlm_zoo.corpus import TOPIC_LINE, Article
from fedhlm_zoo.prompts import load_items

ANSWER_S: Final = 120.0


class Place(NamedTuple):
    """An agent and its cluster."""

    cluster: str
    agent: str


class Task(msgspec.Struct, frozen=True):
    """One request to be: a title to continue, or a whole item whose topic is asked for."""

    kind: str
    text: str
    topic: str
    tokens: int
    temperature: float | None
    seed: int


def tasks_of(articles: tuple[Article, ...], tokens: int, first_seed: int = 0) -> Iterator[Task]:
    """For every item a continuation of its title and, where it has a topic, the question for it."""
    seeds = itertools.count(first_seed)
    for article in articles:
        yield Task("continue", article.title + "\n", article.topic, tokens, None, next(seeds))
        if article.topic:
            yield Task("topic", article.body + TOPIC_LINE, article.topic, 1, 0.0, next(seeds))


def load_prompts(path: Path | None) -> tuple[Article, ...]:
    """News items of a .jsonl file, or any other file's lines as titles; the shipped items without a path.

    Raises:
        DataMissing: a file of items cannot be read or holds nothing.
        ConfigError: a text file cannot be read or holds nothing.
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


class Client:
    """Sends prompts and collects outputs; one request at a time for each agent."""

    def __init__(self, party: Party, places: list[Place], progress: Progress) -> None:
        self.places = places
        self.requests: list[Generated] = []
        self._party = party
        self._progress = progress
        self._open: dict[str, tuple[Generated, asyncio.Future[None]]] = {}
        self._numbers = itertools.count()
        self._online: set[str] = set()
        self._linked: set[str] = set()
        self._ready = asyncio.Event()

    async def listen(self) -> None:
        """Read the bus until it closes."""
        root = self._party.root
        await self._party.bus.subscribe(
            topics.AGENT_STATUS.name(root, cluster="+", agent="+"),
            topics.EDGE_STATUS.name(root, cluster="+"),
            topics.OUTPUT.name(root, cluster="+", agent="+"),
            topics.FL_STATE.name(root, cluster="+"),
            topics.CLOUD_FL_STATE.name(root),
        )
        async for received in self._party.received():
            match received.message:
                case Presence(role="agent") as state:
                    (self._online.add if state.online else self._online.discard)(received.levels["agent"])
                case Presence(role="edge") as state:
                    linked = state.online and state.upstream is not None
                    (self._linked.add if linked else self._linked.discard)(received.levels["cluster"])
                case Output() as output:
                    self._take(output)
                case Learned() as state:
                    self._learned(received.levels.get("cluster", ""), state)
            if {p.agent for p in self.places} <= self._online and {p.cluster for p in self.places} <= self._linked:
                self._ready.set()

    async def wait_ready(self) -> None:
        """Return when every agent is online and every edge sees the cloud."""
        await self._ready.wait()

    async def ask(self, place: Place, task: Task, preset: str | None) -> Generated:
        """Send one prompt and wait for its last output; None leaves the preset to the agent's configuration."""
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
        request = f"r{next(self._numbers)}"
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open[request] = generated, done
        prompt = Prompt(
            **self._party.stamp(),
            request=request,
            text=task.text,
            max_tokens=task.tokens,
            seed=task.seed,
            temperature=task.temperature,
            preset=preset,
        )
        try:
            await self._party.send(topics.PROMPT, prompt, cluster=place.cluster, agent=place.agent)
            async with asyncio.timeout(ANSWER_S):
                await done
        except TimeoutError:
            generated.finish, generated.error = "error", f"no answer within {ANSWER_S:g} s"
            self._progress.finished(generated)
        finally:
            del self._open[request]
        return generated

    def _learned(self, cluster: str, state: Learned) -> None:
        try:
            self._progress.learned(cluster, state)
        except ProtocolError:  # a curve that is none; the view goes without it
            self._party.counters.add("refused_messages")

    def _take(self, output: Output) -> None:
        generated, done = self._open.get(output.request, (None, None))
        if generated is None or done is None or output.position != len(generated.ids):
            return  # not ours, or an MQTT duplicate
        generated.ids += output.ids
        generated.sources += output.sources
        generated.text += output.text
        self._progress.heard(generated)
        if output.finish is not None:
            generated.finish, generated.error = output.finish, output.error
            generated.statistics = dict(output.statistics)
            self._progress.finished(generated)
            if not done.done():
                done.set_result(None)
