"""What every bus must do, checked on the loopback (virtual time), mosquitto (MQTT 5 and 3.1.1) and the embedded broker."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fedhlm.bus.interface import Delivery, Extras, Retained
from fedhlm.errors import BusError
from tests.brokers import MOSQUITTO, Kind, Network, run_on, take, until

Scenario = Callable[[Network], Awaitable[None]]

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


@pytest.fixture(
    params=[
        "loopback",
        pytest.param("mosquitto-5", marks=needs_mosquitto),
        pytest.param("mosquitto-3.1.1", marks=needs_mosquitto),
        "embedded-5",
        "embedded-3.1.1",
    ]
)
def kind(request: pytest.FixtureRequest) -> Kind:
    value: Kind = request.param
    return value


BIRTH, WILL = Retained("p/one/status", b"online"), Retained("p/one/status", b"offline")


def test_a_message_reaches_the_subscriber_and_nobody_else(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two, net.bus("three") as three:
            await two.subscribe("t/two")
            await three.subscribe("t/three")
            assert await one.publish("t/two", b"hello")
            assert await one.publish("t/three", b"", qos=0)
            assert await take(two, 1) == [Delivery("t/two", b"hello", False)]
            assert await take(three, 1) == [Delivery("t/three", b"", False)]
            assert (two.statistics.messages_in, three.statistics.messages_in) == (1, 1)
            assert one.statistics.messages_out == 2

    run_on(kind, scenario)


def test_extras_travel_under_mqtt_5(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two, net.bus("three") as three:
            await two.subscribe("t", "kept")
            extras = Extras("answers/here", b"\x00\xff", (("a", "1"), ("a", "2")))
            some = Extras(user=(("who", "me"),))
            await one.publish("t", b"asked", extras=extras)
            await one.publish("kept", b"", retain=True, qos=0, extras=some)
            await one.publish("kept", b"state", retain=True, extras=some)
            await one.publish("t", b"plain")
            heard = [await two.deliveries().__anext__() for _ in range(4)]
            carries = not kind.endswith("3.1.1")
            assert {d.payload: d.extras for d in heard} == {
                b"asked": extras if carries else None,
                b"": some if carries else None,
                b"state": some if carries else None,
                b"plain": None,
            }
            await three.subscribe("kept")
            assert await take(three, 1) == [Delivery("kept", b"state", True, some if carries else None)]

    run_on(kind, scenario)


def test_a_bus_hears_its_own_messages(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one:
            await one.subscribe("echo")
            await one.publish("echo", b"1")
            assert await take(one, 1) == [Delivery("echo", b"1", False)]

    run_on(kind, scenario)


def test_wildcards_cover_what_mqtt_says(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two:
            await two.subscribe("c/+/a/+/status", "deep/#", "end")
            for topic in ("c/x/a/y/status", "c/x/a/status", "c/x/a/y/z/status", "deep/1", "deep/1/2", "deeper", "deep"):
                await one.publish(topic, topic.encode())
            await one.publish("end", b"")
            names = [delivery.topic for delivery in await take(two, 5)]
            assert names == ["c/x/a/y/status", "deep/1", "deep/1/2", "deep", "end"]

    run_on(kind, scenario)


def test_a_late_subscriber_gets_the_retained_state_marked_as_such(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two, net.bus("three") as three:
            await two.subscribe("state/#")
            await one.publish("state/a", b"old", retain=True)
            await one.publish("state/a", b"new", retain=True)
            await one.publish("state/b", b"gone", retain=True)
            await one.publish("state/b", b"", retain=True)
            seen = await take(two, 4)
            assert [delivery.payload for delivery in seen] == [b"old", b"new", b"gone", b""]
            assert not any(delivery.retain for delivery in seen)
            await three.subscribe("state/#", "mark")
            await one.publish("mark", b"")
            assert sorted(await take(three, 2)) == [Delivery("mark", b"", False), Delivery("state/a", b"new", True)]

    run_on(kind, scenario)


def test_retained_state_is_shown_to_those_who_asked_for_it_only(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two:
            await two.subscribe("state/#")
            await one.publish("state/a", b"secret", retain=True)
            await take(two, 1)
            async with net.bus("three") as three:
                await three.subscribe("mark")
                await one.publish("mark", b"")
                assert await take(three, 1) == [Delivery("mark", b"", False)]

    run_on(kind, scenario)


def test_order_holds_per_topic(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two:
            await two.subscribe("order/+")
            for i in range(400):
                assert await one.publish(f"order/{i % 3}", str(i).encode(), qos=1)
            seen = await take(two, 400)
            for topic in range(3):
                numbers = [int(delivery.payload) for delivery in seen if delivery.topic == f"order/{topic}"]
                assert numbers == list(range(topic, 400, 3))

    run_on(kind, scenario)


def test_an_abnormal_loss_publishes_the_last_will(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("two") as two, net.bus("three") as three:
            await two.subscribe("p/+/status")
            async with net.bus("one", birth=BIRTH, will=WILL):
                assert (await take(two, 1))[0].payload == b"online"
                await net.lose("one")
                assert (await take(two, 1))[0].payload == b"offline"
            await three.subscribe("p/+/status")
            assert await take(three, 1) == [Delivery("p/one/status", b"offline", True)]

    run_on(kind, scenario)


def test_a_clean_exit_leaves_the_presence_offline_after_all_other_messages(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("two") as two:
            await two.subscribe("p/#")
            async with net.bus("one", birth=BIRTH, will=WILL) as one:
                for i in range(5):
                    await one.publish("p/last", str(i).encode())
            payloads = [delivery.payload for delivery in await take(two, 7)]
            assert payloads == [b"online", b"0", b"1", b"2", b"3", b"4", b"offline"]
            assert not await one.publish("p/last", b"after the end")
            assert one.statistics.dropped_out == 1
            with pytest.raises(StopAsyncIteration):
                await anext(one.deliveries())
            with pytest.raises(BusError):
                await one.wait_connected()

    run_on(kind, scenario)


def test_presence_is_offline_when_the_service_is_cancelled(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async def service() -> None:
            async with net.bus("one", birth=BIRTH, will=WILL):
                await asyncio.Event().wait()

        async with net.bus("two") as two:
            await two.subscribe("p/+/status")
            task = asyncio.create_task(service(), name="service")
            assert (await take(two, 1))[0].payload == b"online"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await take(two, 1))[0].payload == b"offline"

    run_on(kind, scenario)


def test_a_full_outgoing_queue_is_reported_and_counted(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one", max_outgoing=4) as one:
            await net.stop()
            await until(lambda: not one.connected)
            taken = [await one.publish("q", str(i).encode()) for i in range(10)]
            assert taken == [True] * 4 + [False] * 6
            assert one.statistics.dropped_out == 6

    run_on(kind, scenario)


def test_a_full_incoming_queue_drops_the_newest_and_counts(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two", max_incoming=4) as two:
            await two.subscribe("q")
            for i in range(10):
                await one.publish("q", str(i).encode())
            await until(lambda: two.statistics.messages_in + two.statistics.dropped_in == 10)
            assert two.statistics.dropped_in == 6
            assert [delivery.payload for delivery in await take(two, 4)] == [b"0", b"1", b"2", b"3"]

    run_on(kind, scenario)


def test_a_restarted_broker_gets_subscriptions_birth_and_waiting_messages_again(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        changes: list[bool] = []
        async with net.bus("one", birth=BIRTH, will=WILL, on_link=changes.append) as one, net.bus("two") as two:
            await two.subscribe("work", "p/+/status")
            assert (await take(two, 1))[0].payload == b"online"
            await net.stop()
            await until(lambda: not one.connected and not two.connected)
            await two.subscribe("late")
            await net.start()
            await two.wait_connected()
            await one.wait_connected()
            await one.publish("work", b"1")
            await one.publish("late", b"2")
            # A broker may publish wills while it goes down, so the number of presence messages is its own business.
            seen: list[Delivery] = []
            while not seen or seen[-1].topic != "late":
                seen += await take(two, 1)
            assert [delivery.payload for delivery in seen if delivery.topic == "work"] == [b"1"]
            assert [delivery.payload for delivery in seen if delivery.topic == "p/one/status"][-1] == b"online"
            assert (one.statistics.reconnects, two.statistics.reconnects) == (1, 1)
            assert changes == [True, False, True]
        assert changes[-1] is False

    run_on(kind, scenario)


def test_messages_published_while_the_broker_is_away_arrive_once_and_in_order(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one:
            await one.subscribe("work")
            await net.stop()
            await until(lambda: not one.connected)
            for i in range(20):
                assert await one.publish("work", str(i).encode())
            await net.start()
            assert [int(delivery.payload) for delivery in await take(one, 20)] == list(range(20))
            assert one.statistics.dropped_out == 0

    run_on(kind, scenario)


def test_what_is_shed_is_never_delivered_and_everything_else_is(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two:
            two.sheds = lambda topic, size: topic == b"t/flood" and size > 20
            await two.subscribe("t/+", qos=0)
            for number in range(300):
                await one.publish("t/flood", bytes(200))
                if not number % 100:
                    await one.publish("t/honest", bytes([number // 100]))
                    await one.publish("t/flood", b"small")
            heard = [(d.topic, d.payload) for d in await take(two, 6)]
            assert sorted(heard) == [("t/flood", b"small")] * 3 + [("t/honest", bytes([n])) for n in range(3)]
            assert two.statistics.messages_in == 6

    run_on(kind, scenario)


def test_an_expired_message_is_not_sent(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two:
            await two.subscribe("work")
            await net.stop()
            await until(lambda: not one.connected and not two.connected)
            await one.publish("work", b"stale", expiry_s=1e-6)
            await net.start()
            await two.wait_connected()
            await one.wait_connected()
            await one.publish("work", b"fresh", expiry_s=30.0)
            assert [delivery.payload for delivery in await take(two, 1)] == [b"fresh"]

    run_on(kind, scenario)


def test_a_megabyte_passes_unchanged(kind: Kind) -> None:
    payload = bytes(range(256)) * 4_096

    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two:
            await two.subscribe("big")
            await one.publish("big", payload)
            assert await take(two, 1) == [Delivery("big", payload, False)]

    run_on(kind, scenario)


def test_two_clients_talk_both_ways_at_once(kind: Kind) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one, net.bus("two") as two:
            await one.subscribe("to/one")
            await two.subscribe("to/two")

            async def answer() -> None:
                for _ in range(50):
                    (request,) = await take(two, 1)
                    await two.publish("to/one", request.payload + b"!")

            async with asyncio.TaskGroup() as group:
                group.create_task(answer(), name="answer")
                for i in range(50):
                    await one.publish("to/two", str(i).encode())
                replies = [delivery.payload for delivery in await take(one, 50)]
            assert replies == [f"{i}!".encode() for i in range(50)]

    run_on(kind, scenario)


@pytest.mark.parametrize("topic", ["", "a/+", "a/#", "a\0b", "x" * 65_536])
def test_an_impossible_topic_is_the_callers_bug(kind: Kind, topic: str) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one:
            with pytest.raises(ValueError, match="topic"):
                await one.publish(topic, b"")

    run_on(kind, scenario)


@pytest.mark.parametrize("pattern", ["", "a+/b", "a/#/b", "a#", "$share//x", "$share/g", "$share/+/x"])
def test_an_impossible_filter_is_the_callers_bug(kind: Kind, pattern: str) -> None:
    async def scenario(net: Network) -> None:
        async with net.bus("one") as one:
            with pytest.raises(ValueError, match="filter"):
                await one.subscribe(pattern)

    run_on(kind, scenario)
