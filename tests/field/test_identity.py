"""Names that meet on one broker: nobody throws another one out, and who does so all the same is told."""

import asyncio
import logging

import pytest

from tests.brokers import until
from tests.field.fleet import both_brokers, fleets

WHILE_S = 2.0


@both_brokers
async def test_two_installations_on_one_broker_leave_each_other_alone(kind: str) -> None:
    async with fleets(kind, "prod/1", "test/1") as installations:
        clients = [await fleet.whole("porch") for fleet in installations]
        await asyncio.sleep(WHILE_S)
        answers = [await client.write("porch", "Oil", max_tokens=4) for client in clients]
        assert [answer.finish for answer in answers] == ["length", "length"]
        assert [fleet.reconnects for fleet in installations] == [{}, {}]


@both_brokers
async def test_names_that_read_alike_when_joined_are_two(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        await fleet.cloud()
        for cluster in ("a-b", "a"):
            await fleet.edge(cluster)
        await fleet.agent("c", "a-b")
        await fleet.agent("b-c", "a")
        client = await fleet.client()
        await asyncio.sleep(WHILE_S)
        for agent in ("c", "b-c"):
            assert (await client.write(agent, "Oil", max_tokens=4)).finish == "length"
        assert fleet.reconnects == {}


@both_brokers
async def test_one_prompt_beside_the_service_disturbs_nobody(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        client = await fleet.whole("porch")
        assert (await client.write("porch", "Oil", max_tokens=4)).finish == "length"
        await fleet.agent("porch", guest="one")
        await fleet.agent("porch", guest="two")
        answer = await client.write("porch", "Oil", max_tokens=4)
        assert answer.finish == "length"
        assert client._places("porch") == ["home"]
        assert fleet.reconnects == {}


@both_brokers
async def test_two_of_one_name_are_told_so_and_give_way(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async with fleets(kind) as (fleet,):
        await fleet.whole("porch")
        with caplog.at_level(logging.WARNING):
            await fleet.agent("porch")
            await until(lambda: "same client id" in caplog.text)
            await asyncio.sleep(WHILE_S)
        lost = sum(fleet.reconnects.values())
        assert lost <= 6, "who was thrown out waits longer each time"
