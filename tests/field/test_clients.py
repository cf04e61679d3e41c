"""Clients at one agent: each hears its own answers, asks under its own name only, and ends its work by going away."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fedhlm.bus.party import Stamp
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Cancel, Output, Prompt, Sampling
from fedhlm_lab.sim import toy
from tests.brokers import until
from tests.field.fleet import Fleet, both_brokers, every_broker, fleets

ROOT = Path(__file__).parents[2]
HOG_PROMPTS = 60
LONG = 200  # tokens, of a few hundredths of a second each
KEEPALIVE_S = 2
TEXT = toy.ToyTokenizer().decode([5, 6])
SEED = next(s for s in range(1_000) if len(toy.large_alone([5, 6], Sampling(s, 0.8), LONG)) == LONG)
ASKING = f"""
import asyncio, sys
import fedhlm
from fedhlm.settings import Broker

async def main(url, name, keepalive_s):
    broker = Broker(url=url, keepalive_s=int(keepalive_s))
    async with fedhlm.Client(broker, name=name) as client:
        options = {{"max_tokens": {LONG}, "seed": {SEED}, "temperature": 0.8}}
        answers = [client.ask("porch", sys.argv[4], **options) for _ in range(3)]
        for answer in answers:
            await answer.begin()
        await anext(answers[0])
        print("begun", flush=True)
        await answers[2].whole()

asyncio.run(main(*sys.argv[1:4]))
"""


@asynccontextmanager
async def asking(fleet: Fleet, *, begun: bool = True) -> AsyncIterator[asyncio.subprocess.Process]:
    """The client ann in a process of its own, with three requests. Where they have `begun`, one is being served."""
    words = (ASKING, fleet.url("client ann"), "ann", str(KEEPALIVE_S), TEXT)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", *words, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert process.stdout is not None
        assert not begun or await process.stdout.readline() == b"begun\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@every_broker
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_who_goes_away_ends_its_work(kind: str, how: signal.Signals) -> None:
    """Killed: the broker sees the connection close. Frozen, or out of reach: its keepalive tells."""
    async with fleets(kind) as (fleet,):
        await fleet.edge()
        cloud = await fleet.cloud()
        agent = await fleet.agent()
        ends: dict[str, Any] = {}
        async with asking(fleet) as process:
            await until(lambda: len(agent.requests.open) == 3 and len(cloud.batcher.sessions) == 1)
            names = list(agent.requests.open)
            publish = agent.agent.party.send

            async def heard(topic: topics.Topic, message: Any, **levels: Any) -> Any:
                if isinstance(message, Output) and message.finish is not None:
                    ends[message.request] = message
                return await publish(topic, message, **levels)

            agent.agent.party.send = heard
            process.send_signal(how)
            async with asyncio.timeout(3.0 if how is signal.SIGKILL else 1.5 * KEEPALIVE_S + 3.0):
                await until(lambda: len(ends) == 3 and len(cloud.batcher.sessions) == 0)
        assert set(ends) == set(names)
        assert {(end.finish, end.error) for end in ends.values()} == {("cancelled", "its client went offline")}
        assert sum(end.position for end in ends.values()) < LONG
        bob = await fleet.client("bob")
        assert (await bob.write("porch", TEXT, max_tokens=4, seed=SEED, temperature=0.8)).finish == "length"


@both_brokers
async def test_two_connections_of_one_name_go_away_apart(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        await fleet.edge()
        await fleet.cloud()
        agent = await fleet.agent()
        async with asking(fleet), asking(fleet, begun=False) as other:
            await until(lambda: len(agent.requests.open) == 6)
            other.kill()
            await until(lambda: len(agent.requests.open) == 3)
            await asyncio.sleep(0.5)
            assert len(agent.requests.open) == 3, "the other connection's requests are served"


@every_broker
async def test_nobody_asks_or_cancels_in_the_name_of_another(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        await fleet.whole("porch")
        ann, bob = await fleet.client("ann"), await fleet.client("bob")
        mine: list[Output] = []
        bob._hear = lambda received: mine.append(received.message) if isinstance(received.message, Output) else None
        await bob.find("porch")
        options: dict[str, Any] = {"max_tokens": LONG, "seed": SEED, "temperature": 0.8, "request": "long"}
        asked = asyncio.create_task(ann.write("porch", TEXT, **options))
        await asyncio.sleep(0.3)
        forged = Stamp("ann")
        place = {"cluster": "home", "agent": "porch"}
        prompt = encode(Prompt(**forged(), request="forged", text=TEXT))
        cancel = encode(Cancel(**forged(), request="long"))
        await bob.party.bus.publish(topics.PROMPT_FROM.name(**place, client="bob"), prompt)
        await bob.party.bus.publish(topics.CANCEL_FROM.name(**place, client="bob"), cancel)
        if kind == "secured":  # these are what an open broker takes from everybody
            for row, payload in ((topics.PROMPT_FROM, prompt), (topics.CANCEL_FROM, cancel)):
                await bob.party.bus.publish(row.name(**place, client="ann"), payload)
            for row, payload in ((topics.PROMPT, prompt), (topics.CANCEL, cancel)):
                await bob.party.bus.publish(row.name(**place), payload)
            await until(lambda: bob.party.bus.statistics.dropped_out == 4)
        await until(lambda: len(mine) == 1)
        assert (mine[0].request, mine[0].refusal) == ("forged", "invalid")
        assert "must be 'bob' (got 'ann')" in mine[0].error
        assert (await asked).finish == "length"


@both_brokers
async def test_an_answer_goes_to_who_asked_and_to_nobody_else(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        await fleet.whole("porch")
        heard: dict[str, list[str]] = {"ann": [], "bob": []}
        people = {}
        for name, found in heard.items():
            people[name] = await fleet.client(name)
            people[name]._hear = lambda received, mine=found: (
                mine.append(received.levels["client"]) if isinstance(received.message, Output) else None
            )
        await asyncio.gather(*(client.write("porch", "Oil", max_tokens=4) for client in people.values()))
        assert {name: set(mine) for name, mine in heard.items()} == {"ann": {"ann"}, "bob": {"bob"}}
        assert topics.OUTPUT.name(cluster="home", agent="porch", client="ann").endswith("/to/ann/output")


@both_brokers
async def test_a_hog_makes_another_client_wait_for_one_prompt_of_its_own(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        await fleet.whole("porch")
        hog, ann = await fleet.client("hog"), await fleet.client("ann")
        await hog.write("porch", "Oil", max_tokens=1)
        await ann.write("porch", "Oil", max_tokens=1)
        many = [asyncio.create_task(hog.write("porch", "Oil", max_tokens=8)) for _ in range(HOG_PROMPTS)]
        await asyncio.sleep(0.2)
        await ann.write("porch", "Oil", max_tokens=8)
        done = sum(task.done() for task in many)
        await asyncio.gather(*many)
        assert done < HOG_PROMPTS / 2, "the quiet client was served before most of the hog's prompts"
