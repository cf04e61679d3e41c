"""A part as a device of Home Assistant: what its discovery says, the values of its sensors, and who publishes them.

Field names are those of Home Assistant's MQTT integration, device discovery (home-assistant.io/integrations/mqtt). All
of it travels on the part's one connection: a second one, whose last will could say that the part is gone, would end the
first where a broker allows one connection per certificate. So an edge says for its agents what their presences say, and
sensors expire (`expire_after`) where nobody is left to say it.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

from fedhlm.bus.interface import Bus
from fedhlm.bus.party import OnForeign, Party
from fedhlm.errors import BusError
from fedhlm.protocol.open_topics import HOME_DEVICE, OpenTopic, as_json, device_of
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import HomeAssistant
from fedhlm.telemetry import Counters, OneLine, warn_once
from fedhlm.version import __version__

log = logging.getLogger(__name__)

AVAILABLE: Final = {True: b"online", False: b"offline"}
STATE_MAX: Final = 255  # characters that Home Assistant accepts as a state
PERIODS: Final = 3  # without values, after which they expire
SOFTWARE: Final = f"fedhlm {__version__}"
_NUMBERS: Final = re.compile(r"\d+")


class Sensor(NamedTuple):
    """A sensor: its key among the values, its name, and what Home Assistant must know of its unit.

    `kind` is a state class: "total_increasing" for a count, "measurement" for what rises and falls, empty for text.
    """

    key: str
    name: str
    kind: str = "measurement"
    unit: str = ""
    device_class: str = ""


_UPLINK: Final = Sensor("uplink_bytes", "Uplink", "total_increasing", "B", "data_size")
_LAST_ERROR: Final = Sensor("last_error", "Last warning or error", "")
AGENT_SENSORS: Final = (
    *(Sensor(f"tokens_{source}", f"Tokens {source}", "total_increasing", "tokens") for source in SOURCES),
    Sensor("risk", "R-hat"),
    Sensor("risk_limit", "R-hat limit"),
    Sensor("tau", "Threshold"),
    Sensor("tokens_per_s", "Tokens per second", unit="tokens/s"),
    _UPLINK,
    _LAST_ERROR,
)
EDGE_SENSORS: Final = (
    Sensor("agents", "Agents", unit="agents"),
    Sensor("escalations", "Blocks", "total_increasing", "blocks"),
    Sensor("peer_answers", "Blocks settled by the cluster", "total_increasing", "blocks"),
    Sensor("neighbour_answers", "Blocks settled by neighbours", "total_increasing", "blocks"),
    Sensor("fleet_risk", "R-hat of the fleet"),
    Sensor("fleet_risk_limit", "R-hat limit of the fleet"),
    _UPLINK,
    _LAST_ERROR,
)


class Asking(NamedTuple):
    """The topics on which a text is asked, and answered."""

    ask: str
    answer: str


class DeviceTopics(NamedTuple):
    """Where a part says whether it is there, and publishes its values; and where it can be asked, if it can."""

    available: str
    values: str
    asking: Asking | None = None


def newest(software: Iterable[str]) -> str:
    """The newest of several versions, each "fedhlm 1.2.3"; empty ones are passed over."""
    return max(filter(None, software), key=lambda one: [int(part) for part in _NUMBERS.findall(one)], default="")


def discovery(
    name: str, model: str, place: DeviceTopics, sensors: Iterable[Sensor], *, period_s: float, via: str = ""
) -> dict[str, Any]:
    """The payload that makes a device of a party. `via` is the party behind which it stands, if there is one."""
    device = device_of(name)

    def entity(key: str, platform: str, title: str, **fields: Any) -> dict[str, Any]:
        return {"platform": platform, "unique_id": f"{device}-{key}", "name": title, **fields}

    entities = {}
    for sensor in sensors:
        text = not sensor.kind
        value = f"{{{{ value_json.{sensor.key}{f'[:{STATE_MAX}]' if text else ''} }}}}"
        known = {
            "state_class": sensor.kind,
            "unit_of_measurement": sensor.unit,
            "device_class": sensor.device_class,
            "entity_category": "diagnostic" if text else "",
        }
        entities[sensor.key] = entity(
            sensor.key,
            "sensor",
            sensor.name,
            value_template=value,
            expire_after=round(PERIODS * period_s),
            **{field: given for field, given in known.items() if given},
        )
    versions = "{{ {'installed_version': value_json.version, 'latest_version': value_json.latest} | to_json }}"
    entities["version"] = entity("version", "update", "Version", value_template=versions, entity_category="diagnostic")
    if place.asking is not None:
        ask, answer = place.asking
        entities["ask"] = entity(
            "ask",
            "text",
            "Ask",
            command_topic=ask,
            state_topic=answer,
            value_template="{{ value_json.question }}",
            min=1,
            max=STATE_MAX,
        )
        entities["answer"] = entity(
            "answer",
            "sensor",
            "Answer",
            state_topic=answer,
            value_template=f"{{{{ value_json.answer[:{STATE_MAX}] }}}}",
            json_attributes_topic=answer,
        )
    return {
        "device": {
            "identifiers": [device],
            "name": name,
            "manufacturer": "fedhlm",
            "model": model,
            "sw_version": __version__,
            **({"via_device": device_of(via)} if via else {}),
        },
        "origin": {"name": "fedhlm", "sw_version": __version__},
        "availability": [{"topic": place.available}],
        "state_topic": place.values,
        "components": entities,
    }


def values(sensors: Iterable[Sensor], figures: Mapping[str, object], *, latest: str) -> dict[str, object]:
    """The values of sensors, from figures by their keys. A missing one is null, which Home Assistant calls unknown."""
    found = {sensor.key: figures.get(sensor.key) for sensor in sensors}
    return found | {"version": SOFTWARE, "latest": newest((SOFTWARE, latest))}


def tokens(counters: Counters) -> dict[str, int]:
    """The committed tokens of an agent by source."""
    return dict.fromkeys(SOURCES, 0) | counters.by_label("tokens_by_source")


class LatestWarning(logging.Handler):
    """Remembers the latest record from WARNING up, as one line without secrets."""

    def __init__(self, party: str, secrets: Iterable[str]) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        self.setFormatter(OneLine(party, secrets))

    def emit(self, record: logging.LogRecord) -> None:
        """Remember a record."""
        self.text = self.format(record).partition("\n")[0]


class Home:
    """Publishes a device and its values while `kept`.

    `place` returns where, which changes when an agent moves; `describe` makes the discovery of a place, and `measure`
    the values now. `listen` returns the topics that the part reads, with what takes their deliveries.
    """

    def __init__(
        self,
        party: Party,
        name: str,
        settings: HomeAssistant,
        *,
        place: Callable[[], DeviceTopics],
        describe: Callable[[DeviceTopics], dict[str, Any]],
        measure: Callable[[str], dict[str, object]],
        listen: Callable[[], dict[str, OnForeign]] = dict,
        secrets: Iterable[str] = (),
    ) -> None:
        self._party = party
        self._name = name
        self._period_s = settings.period_s
        self._place = place
        self._describe = describe
        self._measure = measure
        self._listen = listen
        self._latest = LatestWarning(name, secrets)
        self._listened: dict[str, OnForeign] = {}
        self._told: tuple[Bus, int, DeviceTopics] | None = None

    async def send(self, topic: str, payload: bytes, row: OpenTopic) -> bool:
        """Publish on a topic as its row of the table says. Return whether there was room."""
        return await self._party.bus.publish(topic, payload, qos=row.qos, retain=row.retain)

    async def tell(self, rows: tuple[OpenTopic, OpenTopic]) -> None:
        """Publish the values; before them the device, after a new connection or a move. `rows` are of a `DeviceTopics`."""
        place, bus = self._place(), self._party.bus
        here = (bus, bus.statistics.reconnects, place)
        if here != self._told:
            listened, self._listened = self._listened, self._listen()
            await self._party.listen(self._listened, instead_of=listened)
            config = as_json(self._describe(place))
            sent = await self.send(HOME_DEVICE.name(device=device_of(self._name)), config, HOME_DEVICE)
            if sent and await self.send(place.available, AVAILABLE[True], rows[0]):
                self._told = here
        await self.send(place.values, as_json(self._measure(self._latest.text)), rows[1])

    async def _keep(self, rows: tuple[OpenTopic, OpenTopic]) -> None:
        while True:
            try:
                await self.tell(rows)
            except BusError as exc:
                warn_once(log, self._name, "Home Assistant is told nothing now: %s", exc)
            await asyncio.sleep(self._period_s)

    @asynccontextmanager
    async def kept(self, rows: tuple[OpenTopic, OpenTopic]) -> AsyncIterator[None]:
        """Publish for as long as the context is entered, and say at its end that the part is gone."""
        logging.getLogger().addHandler(self._latest)
        async with asyncio.TaskGroup() as group:
            telling = group.create_task(self._keep(rows), name="home")
            try:
                yield
            finally:
                telling.cancel()
                logging.getLogger().removeHandler(self._latest)
                await self.send(self._place().available, AVAILABLE[False], rows[0])
