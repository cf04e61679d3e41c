"""Clients at one agent: each hears its own answers, and one that asks much makes nobody wait."""

import asyncio

from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output
from tests.field.fleet import both_brokers, fleets

HOG_PROMPTS = 60


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
