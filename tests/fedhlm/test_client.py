"""The client in virtual time: pieces in order from whatever network, and a typed error for each way in which it can fail."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedhlm
from fedhlm.bus.interface import Retained
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.client import AWAY_S, HOLE_S, WINDOW
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Cancel, Output, Prompt
from fedhlm.telemetry import Counters
from fedhlm_lab.sim.link import LinkModel
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.loopback_broker import LoopbackBroker
from fedhlm_lab.sim.virtual import run_virtual

TEXT = "<0><1><2><3><4><5>"


class Actor:
    """An agent that says what a test wants it to say."""

    def __init__(self, world: "World", name: str, cluster: str) -> None:
        self.world, self.name, self.cluster = world, name, cluster
        stamp = Stamp(name)
        topic = topics.AGENT_STATUS.name(cluster=cluster, agent=name)
        birth, will = (Retained(topic, encode(presence(stamp, "agent", online=online))) for online in (True, False))
        bus = LoopbackBus(world.broker, client_id=f"{cluster}-{name}", birth=birth, will=will)
        self.party = Party(bus=bus, stamp=stamp, counters=Counters())
        self.prompts: asyncio.Queue[Prompt] = asyncio.Queue()
        self.cancelled: list[str] = []

    async def start(self) -> "Actor":
        place = {"cluster": self.cluster, "agent": self.name}
        await self.party.bus.subscribe(
            *(row.name(**place, client="+") for row in (topics.PROMPT_FROM, topics.CANCEL_FROM))
        )
        await self.party.bus.__aenter__()
        self.task = asyncio.create_task(self._hear())
        return self

    async def _hear(self) -> None:
        async for received in self.party.received():
            match received.message:
                case Prompt() as prompt:
                    self.prompts.put_nowait(prompt)
                case Cancel() as cancel:
                    self.cancelled.append(cancel.request)

    def outputs(self, prompt: Prompt, count: int = 6) -> list[Output]:
        made = [self.output(prompt, i, ids=(i,), sources=("local",), text=f"<{i}>") for i in range(count)]
        return [*made, self.output(prompt, count, finish="length", statistics={"tau": 0.5})]

    def output(self, prompt: Prompt, position: int, **fields: Any) -> Output:
        named = {"ids": (), "sources": (), "text": "", "client": prompt.sender} | fields
        return Output(**self.party.stamp(), request=prompt.request, position=position, **named)

    async def say(self, *outputs: Output) -> None:
        for output in outputs:
            await self.party.send(
                topics.OUTPUT, output, cluster=self.cluster, agent=self.name, client=output.client or "client"
            )


class World:
    def __init__(self) -> None:
        self.broker = LoopbackBroker(random.Random(1), keepalive_s=2.0, reconnect_s=0.1)
        self.link = LinkModel()

    async def agent(self, name: str = "porch", cluster: str = "home") -> Actor:
        return await Actor(self, name, cluster).start()

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[fedhlm.Client]:
        bus = LoopbackBus(self.broker, client_id=f"client-{random.getrandbits(30)}", link=self.link)
        async with fedhlm.Client(bus, **options) as client:
            yield client


def played(scene: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    run_virtual(scene(World()))


async def pieces_of(answer: fedhlm.Answer) -> list[fedhlm.Piece]:
    return [piece async for piece in answer]


def test_pieces_come_in_order_and_then_the_result() -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            answer = client.ask("porch", "Oil", max_tokens=6, seed=3, stop=("x",), preset="exact", temperature=0.0)
            listening = asyncio.create_task(pieces_of(answer))
            prompt = await porch.prompts.get()
            assert (prompt.text, prompt.max_tokens, prompt.seed, prompt.stop) == ("Oil", 6, 3, ("x",))
            assert (prompt.preset, prompt.temperature, prompt.top_p) == ("exact", 0.0, None)
            await porch.say(*porch.outputs(prompt))
            pieces = await listening
            assert [(p.text, p.ids, p.sources, p.position) for p in pieces] == [
                (f"<{i}>", (i,), ("local",), i) for i in range(6)
            ]
            result = answer.result
            assert (result.text, result.ids, result.finish) == (TEXT, tuple(range(6)), "length")
            assert (result.agent, result.cluster, result.statistics) == ("porch", "home", {"tau": 0.5})
        await asyncio.sleep(1.0)
        assert porch.cancelled == []

    played(scene)


@settings(max_examples=40)
@given(st.permutations(range(7)), st.lists(st.integers(0, 6), max_size=5))
def test_order_and_repetition_change_nothing(order: list[int], again: list[int]) -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            asked = asyncio.create_task(client.write("porch", "Oil"))
            prompt = await porch.prompts.get()
            outputs = porch.outputs(prompt)
            await porch.say(*(outputs[i] for i in [*order, *again]))
            assert (await asked).text == TEXT

    played(scene)


@settings(max_examples=20)
@given(st.integers(0, 6))
def test_what_is_lost_is_said_and_when_it_was_due(lost: int) -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        loop = asyncio.get_running_loop()
        async with world.client() as client:
            answer = client.ask("porch", "Oil", patience_s=60.0)
            listening = asyncio.create_task(pieces_of(answer))
            prompt = await porch.prompts.get()
            await porch.say(*(o for i, o in enumerate(porch.outputs(prompt)) if i != lost))
            began_s = loop.time()
            expected, within_s = (fedhlm.DeadlinePassed, 60.0) if lost == 6 else (fedhlm.PiecesLost, HOLE_S)
            with pytest.raises(expected) as caught:
                await listening
            assert loop.time() - began_s == pytest.approx(within_s, abs=0.1)
            assert answer.result.text == "".join(f"<{i}>" for i in range(lost))
            if isinstance(caught.value, fedhlm.PiecesLost):
                assert caught.value.position == lost
        await asyncio.sleep(1.0)
        assert porch.cancelled == [prompt.request]

    played(scene)


def test_a_late_piece_still_counts() -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            asked = asyncio.create_task(client.write("porch", "Oil"))
            prompt = await porch.prompts.get()
            first, *rest = porch.outputs(prompt)
            await porch.say(*rest)
            await asyncio.sleep(HOLE_S * 0.9)
            await porch.say(first)
            assert (await asked).text == TEXT

    played(scene)


@pytest.mark.parametrize("how", ["break", "aclose", "context", "task", "client"])
def test_whoever_leaves_early_cancels(how: str) -> None:
    async def leave(client: fedhlm.Client) -> None:
        if how == "break":
            async for _ in client.ask("porch", "Oil"):
                break
        elif how == "aclose":
            answer = client.ask("porch", "Oil")
            await anext(answer)
            await answer.aclose()
            assert await anext(answer, None) is None
        else:
            async with client.ask("porch", "Oil") as answer:
                async for _ in answer:
                    if how == "context":
                        break

    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            left = asyncio.create_task(leave(client))
            prompt = await porch.prompts.get()
            await porch.say(*porch.outputs(prompt)[:2])
            if how in ("task", "client"):
                await asyncio.sleep(1.0)
                assert porch.cancelled == []
            if how == "task":
                left.cancel()
            if how != "client":
                await asyncio.wait([left])
                await asyncio.sleep(1.0)
                assert porch.cancelled == [prompt.request]
        await asyncio.wait([left])
        await asyncio.sleep(1.0)
        assert porch.cancelled == [prompt.request]

    played(scene)


def test_closing_from_another_task_ends_the_iteration() -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            answer = client.ask("porch", "Oil")
            listening = asyncio.create_task(pieces_of(answer))
            await porch.prompts.get()
            await answer.aclose()
            with pytest.raises(fedhlm.RequestCancelled):
                await listening

    played(scene)


def test_a_deadline_is_told_to_the_agent_and_kept() -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        loop = asyncio.get_running_loop()
        async with world.client() as client:
            began_s = loop.time()
            answer = client.ask("porch", "Oil", deadline_s=3.0)
            listening = asyncio.create_task(pieces_of(answer))
            prompt = await porch.prompts.get()
            assert prompt.patience_ms == 3_000
            for output in porch.outputs(prompt):
                await porch.say(output)
                await asyncio.sleep(1.1)
            with pytest.raises(fedhlm.DeadlinePassed, match="not whole within 3 s"):
                await listening
            assert answer.result.text == "<0><1><2>"
            assert loop.time() - began_s < 9.0
        await asyncio.sleep(1.0)
        assert porch.cancelled == [prompt.request]

    played(scene)


def test_many_deadlines_that_pass_at_once_send_no_flood() -> None:
    """Each place that comes free would be taken by a request that has milliseconds left, and so on through them all."""

    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:

            async def ask(number: int) -> None:
                with pytest.raises(fedhlm.DeadlinePassed):
                    await client.write("porch", "Oil", deadline_s=2.0 + number / 10_000)

            await asyncio.gather(*(ask(number) for number in range(10 * WINDOW)))
            assert porch.prompts.qsize() == WINDOW
            await asyncio.sleep(1.0)
            assert len(porch.cancelled) == WINDOW

    played(scene)


def test_an_agent_that_is_not_there_is_waited_for_a_moment() -> None:
    async def scene(world: World) -> None:
        loop = asyncio.get_running_loop()
        async with world.client() as client:
            began_s = loop.time()
            with pytest.raises(fedhlm.AgentOffline, match="porch is not online in any cluster"):
                await client.write("porch", "Oil")
            assert loop.time() - began_s == pytest.approx(AWAY_S, abs=0.1)
            asked = asyncio.create_task(client.write("porch", "Oil"))
            await asyncio.sleep(AWAY_S / 2)
            porch = await world.agent()
            await porch.say(*porch.outputs(await porch.prompts.get()))
            assert (await asked).text == TEXT

    played(scene)


@pytest.mark.parametrize("back", [False, True])
def test_an_agent_that_goes_is_waited_for_a_moment(back: bool) -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            asked = asyncio.create_task(client.write("porch", "Oil"))
            prompt = await porch.prompts.get()
            outputs = porch.outputs(prompt)
            await porch.say(*outputs[:3])
            await asyncio.sleep(0.5)
            assert isinstance(porch.party.bus, LoopbackBus)
            porch.party.bus.crash()  # its last will speaks
            if not back:
                with pytest.raises(fedhlm.AgentOffline, match="porch has gone offline"):
                    await asked
                return
            await asyncio.sleep(AWAY_S / 2)
            again = await world.agent()
            await again.say(*outputs[3:])
            assert (await asked).text == TEXT

    played(scene)


def test_an_agent_that_moves_is_not_gone() -> None:
    """It answers where it was asked, though its presence is elsewhere by now."""

    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            asked = asyncio.create_task(client.write("porch", "Oil"))
            prompt = await porch.prompts.get()
            await world.agent(cluster="barn")
            message = presence(porch.party.stamp, "agent", online=False)
            await porch.party.send(topics.AGENT_STATUS, message, cluster="home", agent="porch")
            await asyncio.sleep(3 * AWAY_S)
            await porch.say(*porch.outputs(prompt))
            assert (await asked).text == TEXT

    played(scene)


def test_two_agents_of_one_name_need_a_cluster() -> None:
    async def scene(world: World) -> None:
        await world.agent(cluster="barn")
        porch = await world.agent()
        async with world.client() as client:
            with pytest.raises(fedhlm.ConfigError, match="one of barn, home"):
                await client.write("porch", "Oil")
            asked = asyncio.create_task(client.write("porch", "Oil", cluster="home"))
            await porch.say(*porch.outputs(await porch.prompts.get()))
            assert (await asked).cluster == "home"
            with pytest.raises(
                fedhlm.AgentOffline, match=r"porch is not online in cluster shed .* \(it is in barn, home\)"
            ):
                await client.write("porch", "Oil", cluster="shed")

    played(scene)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"finish": "error", "error": "no such preset"}, fedhlm.RequestRefused),
        ({"finish": "error", "error": "in use", "refusal": "taken"}, fedhlm.RequestNameTaken),
        ({"finish": "cancelled", "error": "somebody did it"}, fedhlm.RequestCancelled),
    ],
)
def test_what_the_agent_says_becomes_an_error(fields: dict[str, Any], expected: type[fedhlm.AskError]) -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            asked = asyncio.create_task(client.write("porch", "Oil"))
            prompt = await porch.prompts.get()
            await porch.say(*porch.outputs(prompt)[:2], porch.output(prompt, 2, **fields))
            with pytest.raises(expected, match=fields["error"]):
                await asked

    played(scene)


def test_outputs_for_another_client_are_not_ours() -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client(name="alice") as alice, world.client(name="bob") as bob:
            first = asyncio.create_task(alice.write("porch", "Oil", request="r"))
            asked = await porch.prompts.get()
            second = asyncio.create_task(bob.write("porch", "Stocks", request="r"))
            taken = await porch.prompts.get()
            await porch.say(*porch.outputs(asked)[:3])
            await porch.say(porch.output(taken, 0, finish="error", error="in use", refusal="taken"))
            await porch.say(*porch.outputs(asked)[3:])
            with pytest.raises(fedhlm.RequestNameTaken):
                await second
            assert (await first).text == TEXT

    played(scene)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 65_537}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -1}, "seed"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 2**24}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"stop": ("x",) * 17}, "stop"),
        ({"preset": "../x"}, "preset"),
        ({"request": "a/b"}, "request"),
        ({"deadline_s": -1.0}, "deadline_s"),
        ({"text": "\ud800"}, "text"),
        ({"text": "x" * (2**20 + 1)}, "text"),
    ],
)
def test_values_out_of_range_never_leave(asked: dict[str, Any], words: str) -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            with pytest.raises(fedhlm.ConfigError) as caught:
                client.ask("porch", **({"text": "Oil"} | asked))
            assert caught.value.key == words
            assert len(str(caught.value)) < 300
            str(caught.value).encode()

    played(scene)


def test_one_name_at_a_time() -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            asked = asyncio.create_task(client.write("porch", "Oil", request="r"))
            prompt = await porch.prompts.get()
            with pytest.raises(fedhlm.ConfigError, match="a name that is not in use"):
                await client.write("porch", "Stocks", request="r")
            await porch.say(*porch.outputs(prompt))
            assert (await asked).text == TEXT
            assert porch.prompts.empty()

    played(scene)


def test_a_closed_bus_ends_what_is_open() -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            asked = asyncio.create_task(client.write("porch", "Oil"))
            await porch.prompts.get()
            assert isinstance(client.party.bus, LoopbackBus)
            client.party.bus.crash()
            with pytest.raises(fedhlm.BusError):
                await asked
            with pytest.raises(fedhlm.FedhlmError):
                await client.write("porch", "Oil")

    played(scene)


def test_many_at_once_are_kept_apart() -> None:
    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client() as client:
            asked = [asyncio.create_task(client.write("porch", str(n), max_tokens=n)) for n in range(1, 9)]
            prompts = [await porch.prompts.get() for _ in asked]
            assert len({prompt.request for prompt in prompts}) == len(asked)
            turns = [porch.outputs(prompt, prompt.max_tokens) for prompt in prompts]
            for step in range(10):
                await porch.say(*(outputs[step] for outputs in turns if step < len(outputs)))
            for n, task in enumerate(asked, start=1):
                assert len((await task).ids) == n

    played(scene)


def test_everything_that_is_heard_is_shown_to_who_asks_for_it() -> None:
    heard: list[str] = []

    async def scene(world: World) -> None:
        porch = await world.agent()
        async with world.client(hear=lambda received: heard.append(received.topic.pattern)) as client:
            await client.subscribe(topics.PROMPT_FROM.name(cluster="+", agent="+", client="+"))
            asked = asyncio.create_task(client.write("porch", "Oil"))
            await porch.say(*porch.outputs(await porch.prompts.get()))
            await asked

    played(scene)
    assert heard.count(topics.OUTPUT.pattern) == 7
    assert {topics.PROMPT_FROM.pattern, topics.AGENT_STATUS.pattern} < set(heard)


def test_what_users_hold_is_found_in_the_package() -> None:
    for name in fedhlm.__all__:
        assert getattr(fedhlm, name) is not None
    assert set(fedhlm.__all__) <= set(dir(fedhlm))
    with pytest.raises(AttributeError, match="no attribute 'Clients'"):
        _ = fedhlm.Clients
