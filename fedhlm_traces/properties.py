"""Convert the MQTT 5 properties of a PUBLISH to a plain dict and back.

Keys: expiry_s, content_type, response_topic, correlation_data (bytes), payload_format (0 bytes, 1 UTF-8), user (list
of pairs). Properties of a single connection (topic alias, subscription identifier) are dropped.
"""

from collections.abc import Mapping
from typing import Any, Final

from paho.mqtt import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fedhlm.errors import TraceError

_NAMES: Final = {
    "MessageExpiryInterval": "expiry_s",
    "ContentType": "content_type",
    "ResponseTopic": "response_topic",
    "CorrelationData": "correlation_data",
    "PayloadFormatIndicator": "payload_format",
    "UserProperty": "user",
}


def properties_of(properties: Properties | None) -> dict[str, Any]:
    """The properties of a delivery; empty under MQTT 3.1.1."""
    if properties is None or properties.isEmpty():  # type: ignore[no-untyped-call]
        return {}
    found = {ours: getattr(properties, theirs) for theirs, ours in _NAMES.items() if hasattr(properties, theirs)}
    if "user" in found:
        found["user"] = [list(pair) for pair in found["user"]]
    return found


def paho_properties(properties: Mapping[str, Any]) -> Properties | None:
    """Invert `properties_of`, without the expiry, which the bus counts down itself.

    Unknown keys are ignored.

    Raises:
        TraceError: a value that MQTT cannot carry.
    """
    wanted = {theirs: properties[ours] for theirs, ours in _NAMES.items() if ours in properties and ours != "expiry_s"}
    if not wanted:
        return None
    made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    try:
        for name, value in wanted.items():
            setattr(made, name, [tuple(map(str, pair)) for pair in value] if name == "UserProperty" else value)
        made.pack()  # type: ignore[no-untyped-call]
    except (MQTTException, TypeError, ValueError, AttributeError) as exc:
        raise TraceError(f"properties {dict(properties)!r:.200}: MQTT 5 cannot carry them ({exc})") from exc
    return made
