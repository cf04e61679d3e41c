"""The embedded broker against clients that are not ours: takeover, wills, keep-alive, limits, and who never reads."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_broker.embedded import EmbeddedBroker
from edge_broker.mqtt import server
from tests.brokers import until

LIMIT_S = 30.0
VERSIONS = pytest.mark.parametrize("version", [paho.MQTTv311, paho.MQTTv5], ids=["3.1.1", "5"])


class Person:
    """A paho client in its own thread, which notes what happens to it."""

    def __init__(
        self, port: int, name: str, version: Any = paho.MQTTv5, *, keepalive: int = 30, **options: Any
    ) -> None:
        self.heard: list[paho.MQTTMessage] = []
        self.gone: list[int] = []
        self.granted: list[list[int]] = []
        self.connack: Any = None
        self.up = False
        self.client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=version, reconnect_on_failure=False)
        self.client.on_connect = self._connected
        self.client.on_message = lambda _c, _u, message: self.heard.append(message)
        self.client.on_disconnect = lambda _c, _u, _f, reason, _p: self.gone.append(reason.value)
        self.client.on_subscribe = lambda _c, _u, _m, codes, _p: self.granted.append([c.value for c in codes])
        if (will := options.pop("will", None)) is not None:
            self.client.will_set(will[0], will[1], 1, True)
        self.client.connect("127.0.0.1", port, keepalive, **options)
        self.client.loop_start()

    def _connected(self, _client: Any, _data: Any, _flags: Any, _reason: Any, properties: Any) -> None:
        self.connack, self.up = properties, True

    def payloads(self) -> list[bytes]:
        return [bytes(message.payload) for message in self.heard]

    async def subscribe(self, *filters: Any, **options: Any) -> None:
        count = len(self.granted)
        self.client.subscribe(
            [f if isinstance(f, tuple) else (f, SubscribeOptions(qos=1)) for f in filters]
            if self.client._protocol == paho.MQTTv5
            else [(f, 1) for f in filters],
            **options,
        )
        await until(lambda: len(self.granted) > count)

    async def publish(self, *args: Any, **options: Any) -> None:
        """Publish and wait, in a thread of its own: the broker runs in this one."""
        info = self.client.publish(*args, **options)
        await asyncio.to_thread(info.wait_for_publish, 5.0)

    def vanish(self) -> None:
        """Go without a goodbye."""
        self.client._sock_close()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class World:
    def __init__(self, broker: EmbeddedBroker) -> None:
        self.broker = broker
        self.people: list[Person] = []
        self.stack = contextlib.ExitStack()

    async def person(self, name: str, version: Any = paho.MQTTv5, **options: Any) -> Person:
        one = Person(self.broker.port, name, version, **options)
        self.people.append(one)
        await until(lambda: one.up or bool(one.gone))
        return one


@contextlib.asynccontextmanager
async def world(**limits: Any) -> AsyncIterator[World]:
    async with asyncio.timeout(LIMIT_S), EmbeddedBroker(**limits) as broker:
        place = World(broker)
        try:
            yield place
        finally:
            for one in place.people:
                await asyncio.to_thread(one.close)
            place.stack.close()


@VERSIONS
async def test_a_second_client_of_a_name_takes_the_place_and_its_birth_is_the_last_word(version: int) -> None:
    async with world() as place:
        watcher = await place.person("watcher")
        await watcher.subscribe("p/x")
        first = await place.person("x", version, will=("p/x", b"off"))
        await first.publish("p/x", b"on 1", qos=1, retain=True)
        await first.subscribe("to/x")
        second = await place.person("x", version, will=("p/x", b"off"))
        await second.publish("p/x", b"on 2", qos=1, retain=True)
        await second.subscribe("to/x")
        await until(lambda: bool(first.gone))
        assert first.gone[0] == (0x8E if version == paho.MQTTv5 else 0x80)
        await until(lambda: len(watcher.heard) >= 3)
        assert watcher.payloads() == [b"on 1", b"off", b"on 2"]
        watcher.client.publish("to/x", b"hello", qos=1)
        await until(lambda: bool(second.heard))
        assert first.heard == []
        late = await place.person("late")
        await late.subscribe("p/x")
        await until(lambda: bool(late.heard))
        assert late.payloads() == [b"on 2"]
        assert place.broker.counts.taken_over == 1


async def test_a_silent_client_is_ended_and_its_will_published() -> None:
    async with world() as place:
        watcher = await place.person("watcher")
        await watcher.subscribe("p/x")
        reader, writer = await asyncio.open_connection("127.0.0.1", place.broker.port)
        body = b"\0\4MQTT\x05\x26\0\1\0\0\2me\0\0\3p/x\0\3off"
        writer.write(bytes([0x10, len(body)]) + body)
        assert (await reader.read(4))[0] == 0x20
        begun_s = asyncio.get_running_loop().time()
        await until(lambda: bool(watcher.heard))
        assert 1.2 <= asyncio.get_running_loop().time() - begun_s <= 3.5
        assert watcher.payloads() == [b"off"]
        rest = await reader.read()
        assert rest[-40:].find(b"\x8d") >= 0, "the reason is told"
        assert place.broker.counts.silent == 1
        writer.close()


async def test_who_says_goodbye_leaves_no_will_and_who_asks_for_it_does() -> None:
    async with world() as place:
        watcher = await place.person("watcher")
        await watcher.subscribe("p/+")
        polite = await place.person("polite", will=("p/polite", b"off"))
        polite.client.disconnect()
        lost = await place.person("lost", will=("p/lost", b"off"))
        lost.vanish()
        await until(lambda: bool(watcher.heard))
        assert [message.topic for message in watcher.heard] == ["p/lost"]


async def test_who_never_reads_fills_a_bounded_queue_and_nobody_else_waits() -> None:
    async with world(queue_bytes=1_000_000) as place:
        nosy = place.stack.enter_context(socket.socket())
        nosy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        nosy.connect(("127.0.0.1", place.broker.port))
        body = b"\0\4MQTT\x04\2\0\0\0\4nosy"
        nosy.sendall(bytes([0x10, len(body)]) + body)
        nosy.sendall(b"\x82\x06\0\1\0\1#\0")
        await asyncio.sleep(0.2)
        sender, reader = await place.person("sender"), await place.person("reader")
        await reader.subscribe("s")
        for _ in range(60):
            sender.client.publish("s", bytes(100_000), qos=1)
        await until(lambda: len(reader.heard) == 60)
        server: Any = place.broker._server
        waiting = server._clients["nosy"]._outbox._bytes
        assert waiting <= 1_000_000
        assert place.broker.counts.dropped >= 10


@VERSIONS
async def test_each_qos_arrives_as_asked_for(version: int) -> None:
    async with world() as place:
        one, two = await place.person("one", version), await place.person("two", version)
        two.client.subscribe(
            [("q/0", 0), ("q/1", 1), ("q/2", 2)]
            if version != paho.MQTTv5
            else [(f"q/{n}", SubscribeOptions(qos=n)) for n in range(3)]
        )
        await until(lambda: bool(two.granted))
        assert two.granted == [[0, 1, 2]]
        for sent in range(3):
            for asked in range(3):
                await one.publish(f"q/{asked}", b"%d" % sent, qos=sent)
        await until(lambda: len(two.heard) == 9)
        found = sorted((m.topic, m.payload, m.qos) for m in two.heard)
        assert found == sorted((f"q/{a}", b"%d" % s, min(a, s)) for a in range(3) for s in range(3))


async def test_what_mqtt_5_adds_reaches_the_subscriber() -> None:
    async with world() as place:
        one, two = await place.person("one"), await place.person("two")
        asked: Any = Properties(PacketTypes.SUBSCRIBE)  # type: ignore[no-untyped-call]
        asked.SubscriptionIdentifier = 42
        await two.subscribe("r/#", properties=asked)
        extra: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        extra.ResponseTopic, extra.CorrelationData, extra.ContentType = "back/here", b"\1\2", "text"
        extra.MessageExpiryInterval, extra.UserProperty = 60, [("a", "b"), ("a", "c")]
        await one.publish("r/x", b"?", qos=1, properties=extra)
        await until(lambda: bool(two.heard))
        found: Any = two.heard[0].properties
        assert (found.ResponseTopic, found.CorrelationData, found.ContentType) == ("back/here", b"\1\2", "text")
        assert found.UserProperty == [("a", "b"), ("a", "c")]
        assert found.SubscriptionIdentifier == [42]
        assert 58 <= found.MessageExpiryInterval <= 60
        assert one.connack.MaximumPacketSize > 16 * 1024 * 1024
        assert one.connack.SessionExpiryInterval == 0


async def test_a_retained_message_that_has_expired_is_shown_to_nobody() -> None:
    async with world() as place:
        one = await place.person("one")
        extra: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        extra.MessageExpiryInterval = 1
        await one.publish("state/short", b"x", qos=1, retain=True, properties=extra)
        await one.publish("state/long", b"y", qos=1, retain=True)
        await asyncio.sleep(1.6)
        await one.subscribe("state/+")
        await until(lambda: bool(one.heard))
        await asyncio.sleep(0.1)
        assert one.payloads() == [b"y"]


async def test_members_of_a_group_share_what_comes() -> None:
    async with world() as place:
        sender = await place.person("sender")
        members = [await place.person(f"m{n}") for n in range(3)]
        for member in members:
            await member.subscribe("$share/g/work/+")
        for n in range(9):
            await sender.publish(f"work/{n}", b"", qos=1)
        await until(lambda: sum(len(m.heard) for m in members) == 9)
        assert [len(m.heard) for m in members] == [3, 3, 3]


async def test_no_local_and_handling_of_retained_are_obeyed() -> None:
    async with world() as place:
        one, two = await place.person("one"), await place.person("two")
        await one.publish("s/kept", b"kept", qos=1, retain=True)
        await one.subscribe(("s/#", SubscribeOptions(qos=1, noLocal=True, retainHandling=2)))
        await two.subscribe(("s/#", SubscribeOptions(qos=1, retainHandling=1, retainAsPublished=True)))
        await two.subscribe(("s/#", SubscribeOptions(qos=1, retainHandling=1, retainAsPublished=True)))
        await one.publish("s/mine", b"mine", qos=1, retain=True)
        await two.publish("s/theirs", b"theirs", qos=1)
        await until(lambda: bool(one.heard) and len(two.heard) >= 3)
        assert one.payloads() == [b"theirs"]
        assert [(m.payload, m.retain) for m in two.heard] == [(b"kept", True), (b"mine", True), (b"theirs", False)]


async def test_a_packet_above_the_limit_ends_the_connection_with_its_reason() -> None:
    async with world(max_packet_bytes=10_000) as place:
        one = await place.person("one", will=("p", b"off"))
        watcher = await place.person("watcher")
        await watcher.subscribe("p")
        assert one.connack.MaximumPacketSize == 10_000
        one.client.publish("s", bytes(20_000), qos=1)
        await until(lambda: bool(one.gone) and bool(watcher.heard))
        assert one.gone == [0x95]


async def test_a_client_is_sent_nothing_larger_than_it_takes() -> None:
    async with world() as place:
        asked: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        asked.MaximumPacketSize = 1_000
        one, two = await place.person("one", properties=asked), await place.person("two")
        await one.subscribe("s")
        for size in (2_000, 10):
            await two.publish("s", bytes(size), qos=1)
        await until(lambda: bool(one.heard))
        assert [len(payload) for payload in one.payloads()] == [10]
        assert place.broker.counts.dropped == 1


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x10\xff\xff\xff\xff\xff",
        b"\x10\xff\xff\xff\x7f",
        b"\x30\x05\0\1t12",
        b"\x10\x0c\0\4MQTT\x04\2\0\0\0\0\x10\x0c\0\4MQTT\x04\2\0\0\0\0",  # CONNECT twice
        b"\x10\x0c\0\4MQTT\x04\2\0\0\0\0\x32\x05\0\1t\0\0",  # packet identifier 0
        b"\x10\x0c\0\4MQTT\x04\2\0\0\0\0\x30\x03\0\1#",
        b"\x10\x0c\0\4MQTT\x04\2\0\0\0\0\x82\x06\0\1\0\1#\3",
        b"\x10\x0c\0\4MQTT\x04\2\0\0\0\0\xf0\0",
    ],
)
async def test_what_is_no_mqtt_ends_its_connection_and_no_other(junk: bytes) -> None:
    async with world() as place:
        good = await place.person("good")
        reader, writer = await asyncio.open_connection("127.0.0.1", place.broker.port)
        writer.write(junk)
        async with asyncio.timeout(5.0):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
        await good.subscribe("t")
        await good.publish("t", b"x", qos=1)
        await until(lambda: bool(good.heard))


async def test_stopping_tells_clients_and_leaves_no_connection() -> None:
    async with world() as place:
        one = await place.person("one", will=("p", b"off"))
        await place.broker.stop()
        await until(lambda: bool(one.gone))
        assert one.gone == [0x8B]
        await place.broker.start()


async def test_a_connect_that_comes_too_slowly_ends_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECT_TIMEOUT_S", 1.0)
    async with world() as place:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.broker.port)
        with contextlib.suppress(ConnectionError):
            for byte in b"\x10\x7f\0\4MQTT" + bytes(60):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.1)
                if reader.at_eof():
                    break
        # A byte that arrives after the end is answered by a reset, which the reader keeps as its exception.
        assert reader.at_eof() or isinstance(reader.exception(), ConnectionError)
        assert place.broker.counts.silent == 1
        writer.close()


FEW_FILES = """
import asyncio, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from edge_broker import embedded
asyncio.run(embedded.serve_forever(ready=lambda url: print(url, flush=True)))
"""


async def test_more_connections_than_open_files_leave_those_who_log_in_alone() -> None:
    async with asyncio.timeout(LIMIT_S):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FEW_FILES, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            port = int((await process.stdout.readline()).rpartition(b":")[2])
            good = await asyncio.to_thread(Person, port, "good")
            await until(lambda: good.up)
            with contextlib.ExitStack() as stack:
                silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(400)]
                late = await asyncio.to_thread(Person, port, "late")
                await until(lambda: late.up)
                await good.subscribe("t")
                await late.publish("t", b"x", qos=1)
                await until(lambda: bool(good.heard))
                assert silent[0].recv(1) == b"", "the oldest have made room"
            for one in (good, late):
                await asyncio.to_thread(one.close)
        finally:
            process.kill()
        _, said = await process.communicate()
        assert b"out of system resource" not in said
        assert said.count(b"\n") < 10
