"""An agent as a device of Home Assistant, which shows its figures and can ask it for a text."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Final

from edge_agent.local import LocalQuestions
from edge_agent.service import AgentService
from fedhlm.answering import Question
from fedhlm.bus.interface import Delivery
from fedhlm.bus.party import OnForeign
from fedhlm.decoding.text import encode_prompt
from fedhlm.home import AGENT_SENSORS, STATE_MAX, Asking, DeviceTopics, Home, discovery, tokens, values
from fedhlm.protocol.open_topics import HOME_AGENT_AVAILABLE, HOME_AGENT_VALUES, HOME_ANSWER, HOME_ASK, as_json
from fedhlm.protocol.roles import edge_name
from fedhlm.settings import Config
from fedhlm.telemetry import Counters

ASKED_MAX: Final = 4  # questions that wait for their answers; further ones are refused
BUSY: Final = f"at most {ASKED_MAX} questions may wait"
NO_TEXT: Final = "question must be UTF-8 text"
TOO_LONG: Final = f"question must be at most {STATE_MAX} characters (got {{}})"


class AgentHome:
    """Publishes an agent's device and answers what it is asked there."""

    def __init__(self, service: AgentService, questions: LocalQuestions, config: Config, counters: Counters) -> None:
        self._service = service
        self._questions = questions
        self._config = config
        self._counters = counters
        self._answers: set[asyncio.Task[None]] = set()
        self._counted: tuple[float, int] | None = None
        self._home = Home(
            service.agent.party,
            service.agent.name,
            config.home_assistant,
            place=self._place,
            describe=self._describe,
            measure=self._measure,
            listen=self._listen,
            secrets=(config.broker.password,),
        )

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Publish and answer for as long as the context is entered."""
        try:
            async with self._home.kept((HOME_AGENT_AVAILABLE, HOME_AGENT_VALUES)):
                yield
        finally:
            for task in self._answers:
                task.cancel()

    def _levels(self) -> dict[str, str]:
        return {"cluster": self._service.agent.cluster, "agent": self._service.agent.name}

    def _place(self) -> DeviceTopics:
        root, levels = self._config.broker.root, self._levels()
        client = self._config.home_assistant.client
        return DeviceTopics(
            HOME_AGENT_AVAILABLE.name(root, **levels),
            HOME_AGENT_VALUES.name(root, **levels),
            Asking(HOME_ASK.name(root, client=client, **levels), HOME_ANSWER.name(root, client=client, **levels)),
        )

    def _describe(self, place: DeviceTopics) -> dict[str, object]:
        agent = self._service.agent
        return discovery(
            agent.name,
            f"agent of cluster {agent.cluster} with {agent.fingerprint.model}",
            place,
            AGENT_SENSORS,
            period_s=self._config.home_assistant.period_s,
            via=edge_name(agent.cluster),
        )

    def _measure(self, last_error: str) -> dict[str, object]:
        now_s, by_source = asyncio.get_running_loop().time(), tokens(self._counters)
        total = sum(by_source.values())
        before_s, before = self._counted or (now_s, total)
        self._counted = (now_s, total)
        figures: dict[str, object] = {f"tokens_{source}": count for source, count in by_source.items()}
        figures |= self._counters.gauges()
        figures |= {
            "tokens_per_s": round((total - before) / (now_s - before_s), 3) if now_s > before_s else 0.0,
            "uplink_bytes": self._counters["uplink_bytes"],
            "last_error": last_error,
        }
        return values(AGENT_SENSORS, figures, latest=self._service.agent.edge_software)

    def _listen(self) -> dict[str, OnForeign]:
        asking = self._place().asking
        return {} if asking is None else {asking.ask: self._ask}

    async def _ask(self, delivery: Delivery) -> None:
        if delivery.retain:  # it was asked at another time
            self._counters.add("refused_messages")
            return
        try:
            text = delivery.payload.decode()
        except UnicodeDecodeError:
            self._counters.add("refused_messages")
            await self._say("", "", NO_TEXT)
            return
        if len(text) > STATE_MAX or len(self._answers) >= ASKED_MAX:
            self._counters.add("dropped_messages")
            await self._say(text, "", BUSY if len(text) <= STATE_MAX else TOO_LONG.format(len(text)))
            return
        task = asyncio.create_task(self._answer(text), name="home-answer")
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, text: str) -> None:
        offer, generation = self._questions.offer, self._config.generation
        asker = self._config.home_assistant.client
        ids = tuple(encode_prompt(offer.tokenizer, text, offer.bos_id))
        found, error = "", ""
        async with aclosing(self._questions.answer(Question(asker, ids, generation.max_tokens))) as slices:
            async for piece in slices:
                found, error = found + piece.text, piece.error
        await self._say(text, found, error)

    async def _say(self, question: str, answer: str, error: str) -> None:
        asking = self._place().asking
        if asking is not None:
            payload = {"question": question[:STATE_MAX], "answer": answer, "error": error}
            await self._home.send(asking.answer, as_json(payload), HOME_ANSWER)
