"""What Home Assistant is told, held against its documented options, and who tells it when."""

import asyncio
import json
import logging
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from fedhlm.bus.interface import Delivery
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp
from fedhlm.errors import BusError
from fedhlm.home import (
    AGENT_SENSORS,
    EDGE_SENSORS,
    Asking,
    DeviceTopics,
    Home,
    LatestWarning,
    Sensor,
    discovery,
    newest,
    values,
)
from fedhlm.protocol.open_topics import (
    HOME_AGENT_AVAILABLE,
    HOME_AGENT_VALUES,
    HOME_DEVICE,
    OPEN_TABLE,
    device_of,
)
from fedhlm.protocol.topics import lookup
from fedhlm.settings import HomeAssistant
from fedhlm.telemetry import Counters
from tests.brokers import Mosquitto

# The options of home-assistant.io/integrations/mqtt (device discovery), sensor.mqtt, text.mqtt and update.mqtt that a
# device, its origin and its entities may have.
ROOT = {"device", "origin", "components", "availability", "state_topic", "command_topic", "qos", "encoding"}
DEVICE = {
    *("configuration_url", "connections", "hw_version", "identifiers", "manufacturer", "model", "model_id", "name"),
    *("serial_number", "suggested_area", "sw_version", "via_device"),
}
COMMON = {
    *("platform", "unique_id", "name", "availability", "entity_category", "icon", "json_attributes_topic"),
    *(
        "json_attributes_template",
        "object_id",
        "enabled_by_default",
        "qos",
        "encoding",
        "state_topic",
        "value_template",
    ),
}
OPTIONS = {
    "sensor": COMMON
    | {"device_class", "expire_after", "force_update", "options", "state_class", "unit_of_measurement"}
    | {"last_reset_value_template", "suggested_display_precision"},
    "text": COMMON | {"command_topic", "command_template", "max", "min", "mode", "pattern", "retain"},
    "update": COMMON
    | {"command_topic", "device_class", "latest_version_topic", "latest_version_template", "payload_install"}
    | {"release_summary", "release_url", "retain", "title", "display_precision"},
}
STATE_CLASSES = {"measurement", "total", "total_increasing"}
LIMIT_S = 30.0
AT_DOOR = DeviceTopics("r/available", "r/values", Asking("r/ask", "r/answer"))


def devices() -> list[dict[str, Any]]:
    agent = discovery("porch.1", "agent", AT_DOOR, AGENT_SENSORS, period_s=10.0, via="edge-home")
    edge = discovery("edge-home", "edge", DeviceTopics("r/available", "r/values"), EDGE_SENSORS, period_s=10.0)
    return [agent, edge]


@pytest.mark.parametrize("device", devices(), ids=["agent", "edge"])
def test_a_device_has_documented_options_only(device: dict[str, Any]) -> None:
    assert device.keys() <= ROOT
    assert device["device"].keys() <= DEVICE
    assert device["device"]["identifiers"]
    assert device["origin"]["name"]
    assert [entry.keys() for entry in device["availability"]] == [{"topic"}]
    ids = [entity["unique_id"] for entity in device["components"].values()]
    assert len(set(ids)) == len(ids)
    for key, entity in device["components"].items():
        platform = entity["platform"]
        assert entity.keys() <= OPTIONS[platform], key
        assert entity.get("state_class", "measurement") in STATE_CLASSES
        assert entity.get("entity_category", "diagnostic") in ("diagnostic", "config")
        if platform == "text":
            assert entity["command_topic"] == "r/ask"
            assert 0 < entity["min"] <= entity["max"] <= 255
        # A text has no number's unit or class: Home Assistant would refuse its values.
        if "state_class" not in entity:
            assert not {"unit_of_measurement", "device_class"} & entity.keys()


def test_a_device_stands_behind_its_edge_and_can_be_asked_only_where_there_is_a_model() -> None:
    agent, edge = devices()
    assert agent["device"]["via_device"] in edge["device"]["identifiers"]
    assert {"ask", "answer"} <= agent["components"].keys()
    assert not {"ask", "answer"} & edge["components"].keys()
    assert {"version"} <= agent["components"].keys() & edge["components"].keys()


@pytest.mark.parametrize("sensors", [AGENT_SENSORS, EDGE_SENSORS])
def test_every_sensor_reads_a_value_that_is_sent(sensors: tuple[Sensor, ...]) -> None:
    sent = values(sensors, {}, latest="")
    entities = discovery("x", "x", AT_DOOR, sensors, period_s=10.0)["components"]
    for key in (*(sensor.key for sensor in sensors), "version"):
        read = set(re.findall(r"value_json\.(\w+)", entities[key]["value_template"]))
        assert read
        assert read <= sent.keys()


def test_values_expire_after_three_periods() -> None:
    device = discovery("x", "x", AT_DOOR, AGENT_SENSORS, period_s=40.0)
    assert {device["components"][sensor.key]["expire_after"] for sensor in AGENT_SENSORS} == {120}


@pytest.mark.parametrize(("one", "other"), [("a.b", "a_b"), ("a_2eb", "a.b"), ("A", "a")])
def test_two_names_are_two_devices(one: str, other: str) -> None:
    assert device_of(one) != device_of(other)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", device_of(one))  # all that a discovery topic may have


def test_the_newest_version_is_by_number() -> None:
    assert newest(("fedhlm 0.9.0", "", "fedhlm 0.10.0", "fedhlm 0.2.11")) == "fedhlm 0.10.0"
    assert newest(()) == ""


def test_no_topic_is_one_of_the_messages() -> None:
    levels = {"cluster": "home", "agent": "porch", "client": "desk", "device": "porch", "org": "o", "suffix": "1"}
    names = [topic.name(**levels) for topic in OPEN_TABLE]
    assert len(set(names)) == len(names)
    assert [lookup(name) for name in names] == [None] * len(names)


def test_the_latest_warning_hides_secrets() -> None:
    latest = LatestWarning("porch", ("hush",))
    logger = logging.getLogger("lone")
    logger.addHandler(latest)
    logger.info("nothing")
    assert latest.text == ""
    logger.warning("the password is hush\nand more")
    assert "password is" in latest.text
    assert "hush" not in latest.text
    assert "\n" not in latest.text


@asynccontextmanager
async def seen(broker: Mosquitto, *filters: str) -> AsyncIterator[asyncio.Queue[Delivery]]:
    """What a client hears under some filters."""
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    bus = MqttBus(broker.url, client_id="eye", rng=random.Random(0))
    await bus.subscribe(*filters)

    async def listen() -> None:
        async for delivery in bus.deliveries():
            queue.put_nowait(delivery)

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(bus)
        task = asyncio.create_task(listen())
        stack.callback(task.cancel)
        yield queue


def home(bus: MqttBus, place: Callable[[], DeviceTopics]) -> Home:
    return Home(
        Party(bus=bus, stamp=Stamp("porch"), counters=Counters()),
        "porch",
        HomeAssistant(enabled=True),
        place=place,
        describe=lambda at: discovery("porch", "agent", at, AGENT_SENSORS, period_s=10.0),
        measure=lambda error: values(AGENT_SENSORS, {"last_error": error}, latest=""),
    )


async def test_a_device_is_told_once_and_again_after_a_move_or_a_new_connection() -> None:
    rows = (HOME_AGENT_AVAILABLE, HOME_AGENT_VALUES)
    async with asyncio.timeout(LIMIT_S), Mosquitto() as broker:
        here = [AT_DOOR]
        bus = MqttBus(broker.url, client_id="porch", rng=random.Random(1))
        async with seen(broker, "homeassistant/#", "r/#", "s/#") as heard, bus:
            device = home(bus, lambda: here[0])

            async def told(count: int) -> list[str]:
                await device.tell(rows)
                return [(await heard.get()).topic for _ in range(count)]

            config = HOME_DEVICE.name(device="fedhlm-porch")
            assert await told(3) == [config, "r/available", "r/values"]
            assert await told(1) == ["r/values"]
            here[0] = DeviceTopics("s/available", "s/values")
            assert await told(3) == [config, "s/available", "s/values"]
            bus.statistics.reconnects += 1
            assert await told(3) == [config, "s/available", "s/values"]


async def test_a_part_that_ends_says_so_and_warnings_are_values() -> None:
    async with asyncio.timeout(LIMIT_S), Mosquitto() as broker:
        bus = MqttBus(broker.url, client_id="porch", rng=random.Random(1))
        async with seen(broker, "r/#") as heard, bus:
            device = home(bus, lambda: AT_DOOR)
            async with device.kept((HOME_AGENT_AVAILABLE, HOME_AGENT_VALUES)):
                assert (await heard.get()).payload == b"online"
                assert json.loads((await heard.get()).payload)["last_error"] == ""
                logging.getLogger("fedhlm.somewhere").warning("the cat is away")
                await device.tell((HOME_AGENT_AVAILABLE, HOME_AGENT_VALUES))
                assert "the cat is away" in json.loads((await heard.get()).payload)["last_error"]
            assert (await heard.get()).payload == b"offline"


async def test_a_refused_subscription_ends_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    async with asyncio.timeout(LIMIT_S), Mosquitto() as broker:
        bus = MqttBus(broker.url, client_id="porch", rng=random.Random(1))

        async def refuse(*_filters: str, qos: int = 1) -> None:
            raise BusError("no")

        monkeypatch.setattr(bus, "subscribe", refuse)
        async with bus, home(bus, lambda: AT_DOOR).kept((HOME_AGENT_AVAILABLE, HOME_AGENT_VALUES)):
            await asyncio.sleep(0.05)
