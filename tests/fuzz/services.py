"""An agent, an edge and a cloud on one loopback bus in virtual time, and a way to put anything into their inboxes.

What is put in bypasses the broker, so that names which no broker forwards come in too. Every container that strangers
can fill is listed with its bound.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from cloud_verifier import batching, clustering, coordinator, queues
from edge_agent import core as agent_module
from edge_agent.membership import CLUSTERS_MAX
from edge_agent.requests import PROMPTS_MAX, REQUESTS_REMEMBERED
from edge_agent.service import ModelFacts
from edge_agent.wiring import SmallModel, service_of
from edge_broker import memory as edge_memory
from edge_broker import relay as edge_cluster
from edge_broker import service as edge_service
from fedhlm import config, telemetry
from fedhlm.bus.interface import DEFAULT_MAX_INCOMING, Delivery, topic_matches
from fedhlm.bus.party import Stamp, presence
from fedhlm.learning import federation
from fedhlm.process.runtime import Runtime
from fedhlm.process.saver import inline
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import MAX_CURVES
from fedhlm.protocol.messages import Assignment, Output, Prompt
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.loopback import LoopbackBus
from tests.edge_broker.world import Hand, World
from tests.fuzz.mutators import SESSIONS, Hostile

LETTERS: Final = "".join(chr(ord("0") + i) for i in range(toy.VOCAB_SIZE - 2))
PROMPT_S: Final = 120.0  # virtual
STEP_S: Final = 0.0005  # virtual time between two messages


def toy_tokenizer() -> Tokenizer:
    """One token a character."""
    vocabulary = {"<eos>": toy.EOS_ID, "?": 1, **{letter: i for i, letter in enumerate(LETTERS, start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return tokenizer


class Size(NamedTuple):
    """How much a container holds, and how much it may."""

    held: int
    bound: int


class Parts:
    """The world under attack; `preset` is the agent's."""

    def __init__(self, seed: int, preset: str = "exact") -> None:
        self.world = World()
        self.rng = random.Random(seed)
        self.loaded = config.load(
            preset=preset,
            environ={},
            flags={
                "agent.id": "a0",
                "cluster.name": "c0",
                "generation.consensus.size": "64",
                "generation.deadline_ms": "60000",
                "generation.max_tokens": "16",
            },
        )
        self.sessions = 0
        self.attacked = True
        self.slowest: dict[str, tuple[float, Hostile]] = {}
        self._asked = 0

    async def start(self) -> None:
        """Bring every part up."""
        grouping = clustering.Clusterer(("c0",), columns=coordinator.COLUMNS, interval_s=60.0)
        self.cloud = await self.world.cloud(grouping=grouping, assign_s=120.0).start()
        self.edge = await self.world.edge("c0").start()
        self.client = await Hand(self.world, "client").start(topics.OUTPUT.name(cluster="+", agent="a0", client="+"))
        self.agent = service_of(
            self.loaded,
            Runtime(self.world.counters, wall_s=self.world.wall_s, in_thread=inline),
            SmallModel(toy.ToyDrafter(agreement=0.7), toy.FINGERPRINT, ""),
            ModelFacts(toy_tokenizer(), None, frozenset({toy.EOS_ID}), toy.CONTEXT),
            open_bus=partial(LoopbackBus, self.world.broker),
            new_session=self._new_session,
            rng=np.random.default_rng(1),
        )
        await self.agent.subscribe()
        await self.agent.agent.party.bus.__aenter__()
        self.agent_task = asyncio.create_task(self.agent.run())
        await asyncio.sleep(1.0)

    @property
    def inboxes(self) -> dict[str, LoopbackBus]:
        """Where messages are put: the agent's is another one after each move to another cluster."""
        agent = self.agent.agent.party.bus
        assert isinstance(agent, LoopbackBus)
        edge_down, edge_up = self.edge.buses
        return {"agent": agent, "edge-down": edge_down, "edge-up": edge_up, "cloud": self.cloud.buses[0]}

    def _new_session(self) -> int:
        self.sessions += 1
        # In the attack they are those that hostile verdicts are about; the cloud's state of them is forged too.
        return self.sessions % SESSIONS if self.attacked else 1_000 + self.sessions

    def refused(self) -> int:
        """Messages refused so far, whatever the reason was."""
        names = ("refused_messages", "refused_contributions", "refused_keys", "late_verdicts")
        return sum(self.world.counters[name] for name in names)

    async def disturb(self) -> None:
        """Ask for a text and do not wait, so that verdicts find a generation under way."""
        self._asked += 1
        stamp = self.client.party.stamp()
        prompt = Prompt(**stamp, request=f"amid-{self._asked}", text="abcab", max_tokens=16, seed=self._asked)
        await self.put("agent", Hostile(topics.PROMPT.name(cluster="c0", agent="a0"), encode(prompt)))

    async def stop(self) -> None:
        """End every part."""
        self.agent_task.cancel()
        self.client.task.cancel()
        await asyncio.wait([self.agent_task, self.client.task])
        await self.edge.stop()
        await self.cloud.stop()

    def aim(self, rng: random.Random, message: Hostile) -> str:
        """Mostly a part that subscribes to the topic, as a broker would have it; else any."""
        found = [part for part, bus in self.inboxes.items() if _subscribed(bus, message.topic)]
        return rng.choice(found if found and rng.random() < 0.95 else list(self.inboxes))

    async def put(self, part: str, message: Hostile) -> float:
        """Give a part one message and let it be handled; the CPU seconds that this took."""
        bus = self.inboxes[part]
        before = time.thread_time()
        bus.receive(Delivery(message.topic, message.payload, False), len(message.payload))
        for _ in range(8):  # handled, without any time going by
            await asyncio.sleep(0)
        took = time.thread_time() - before
        if took > self.slowest.get(part, (0.0, message))[0]:
            self.slowest[part] = (took, message)
        return took

    async def rest(self) -> None:
        """Let a little time go by, and see that every part is alive."""
        await asyncio.sleep(STEP_S)
        for task in (self.agent_task, self.edge.task, self.cloud.task):
            if task is None or task.done():
                raise AssertionError(f"a service has ended: {task}")

    async def ask(self, text: str = "abcab", tokens: int = 16) -> tuple[list[int], str | None]:
        """A valid prompt over the bus, as any client sends it; the ids that come back, and how it ended."""
        self._asked += 1
        request = f"valid-{self._asked}"
        self.client.heard.clear()
        prompt = Prompt(**self.client.party.stamp(), request=request, text=text, max_tokens=tokens, seed=self._asked)
        await self.client.party.send(topics.PROMPT, prompt, cluster="c0", agent="a0")
        ids: list[int] = []
        for _ in range(round(PROMPT_S / 0.1)):
            await asyncio.sleep(0.1)
            mine = [o for o in self.client.of(Output) if o.request == request]
            if mine and mine[-1].finish is not None:
                for output in mine:
                    ids += output.ids
                return ids, mine[-1].finish
        return ids, None

    def oracle(self, text: str = "abcab", tokens: int = 16) -> list[int]:
        """What the LLM alone answers to the last prompt asked."""
        generation = self.loaded.config.generation
        sampling = generation.sampling(self._asked)
        return toy.large_alone(toy_tokenizer().encode(text).ids, sampling, tokens)

    async def calm(self) -> None:
        """What the honest cloud and edge say when they come back: where they are, and where the agent belongs.

        Their words were forged in the attack, which access control prevents on a real broker.
        """
        self.attacked = False
        await asyncio.sleep(60.0)
        cloud, edge = Stamp("cloud", self.world.wall_s), Stamp("edge-c0", self.world.wall_s)
        state = presence(cloud, "cloud", online=True, fingerprint=toy.FINGERPRINT)
        await self.put("edge-up", Hostile(topics.CLOUD_STATUS.name(), encode(state)))
        await self.put("agent", Hostile(topics.ASSIGN.name(agent="a0"), encode(Assignment(**edge(), cluster="c0"))))
        edge_state = presence(edge, "edge", online=True, upstream=toy.FINGERPRINT)
        await self.put("agent", Hostile(topics.EDGE_STATUS.name(cluster="c0"), encode(edge_state)))
        await asyncio.sleep(60.0)

    def sizes(self) -> dict[str, Size]:
        """Every container that a message can add to."""
        edge, cloud, agent = self.edge.service, self.cloud.service, self.agent.agent
        grouping = cloud.coordinator.grouping
        doubts = sum(len(known) for known in edge.memory._doubts.values())
        running = cloud.batcher.running
        found = {
            "edge.relay.pending": Size(len(edge.relay.pending), DEFAULT_MAX_INCOMING),
            "edge.relay.epochs": Size(len(edge.relay._epochs), edge_cluster.SESSIONS_MAX),
            "edge.memory.sessions": Size(len(edge.memory._doubts), edge_memory.SESSIONS_MAX),
            "edge.memory.doubts": Size(doubts, edge_memory.DOUBTS_TOTAL),
            "edge.memory.pending": Size(len(edge.memory._pending), edge_memory.PENDING_MAX),
            "edge.memory.pending bytes": Size(
                sum(len(block.ids) for block in edge.memory._pending.values()), edge_memory.PENDING_BYTES
            ),
            "edge.memory.tokens": Size(edge.memory.size, 64),
            "edge.memory.digest": Size(edge.memory.waiting, edge_memory.DIGEST_MAX * edge_memory.DIGESTS_MAX),
            "edge.agents": Size(len(edge.agents), getattr(edge_service, "AGENTS_MAX", 4_096)),
            "edge.assigned": Size(len(edge._assigned), edge_service.ASSIGNED_MAX),
            "edge.members": Size(len(edge.members), federation.MEMBERS_MAX),
            "cloud.caches": Size(cloud.batcher.cached_bytes, cloud.batcher.cache_bytes),
            "cloud.sessions": Size(len(cloud.batcher.sessions), 8),
            "cloud.waiting": Size(cloud.batcher.waiting, queues.WAITING_MAX),
            "cloud.running": Size(len(running), batching.RUNNING_MAX),
            "cloud.running of an agent": Size(
                max(Counter(r.job.key.owner for r in running).values(), default=0),
                batching.RUNNING_OF_ONE,
            ),
            "cloud.members": Size(len(cloud.coordinator.members), federation.MEMBERS_MAX),
            "cloud.profiles noted": Size(len(cloud.coordinator._noted), clustering.PROFILES_MAX),
            "cloud.profiles": Size(len(grouping._profiles), clustering.PROFILES_MAX),
            "cloud.clusters": Size(len(grouping._clusters), clustering.CLUSTERS_MAX),
            "agent.sessions": Size(len(agent._routes), 1),
            "agent.events": Size(max((q.qsize() for q in agent._routes.values()), default=0), agent_module.EVENTS_MAX),
            "agent.prompts": Size(len(self.agent.requests.open), PROMPTS_MAX),
            "agent.requests": Size(len(self.agent.requests), 2 * REQUESTS_REMEMBERED),
            "agent.considered": Size(len(agent.membership._considered), CLUSTERS_MAX),
            "agent.visited": Size(len(agent.membership._visited), CLUSTERS_MAX),
            "agent.peers": Size(len(agent.peers.centroid.peers), 64),
            "agent.memory": Size(agent.peers.memory.size, 64),
            "agent.curves": Size(len(agent.learner.cluster), MAX_CURVES),
            "warnings": Size(len(telemetry._warned), telemetry.WARNED_MAX),
        }
        found |= {f"inbox {part}": Size(len(bus._inbox), DEFAULT_MAX_INCOMING) for part, bus in self.inboxes.items()}
        return found

    def check_sizes(self) -> None:
        """No container is over its bound."""
        over = {name: size for name, size in self.sizes().items() if size.held > size.bound}
        if over:
            raise AssertionError(f"over the bound: {over}")


def _subscribed(bus: LoopbackBus, name: str) -> bool:
    return any(topic_matches(pattern.split("/"), name) for pattern in bus._filters)


@contextmanager
def no_tracebacks() -> Iterator[list[logging.LogRecord]]:
    """Collect records with a traceback: what a broad `except` at a service's edge has caught is a bug found."""
    caught: list[logging.LogRecord] = []

    class Catcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[0] is not None:
                caught.append(record)

    handler = Catcher()
    logging.getLogger().addHandler(handler)
    try:
        yield caught
    finally:
        logging.getLogger().removeHandler(handler)
    if caught:
        formatter = logging.Formatter()
        raise AssertionError("\n".join(formatter.format(record) for record in caught[:3]))
