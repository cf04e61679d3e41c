"""The types of MQTT 3.1.1 and 5: packet types, reason codes, properties, and decoded packets.

`edge_broker.mqtt.wire` decodes and encodes them. Source: OASIS MQTT 3.1.1 and 5.0; sections are cited as in 5.0.
"""

from enum import IntEnum
from typing import Final, NamedTuple

V3: Final = 4
V5: Final = 5
VERSIONS: Final = (V3, V5)
MAX_LENGTH: Final = 268_435_455  # 1.5.5, four bytes of seven bits


class PacketType(IntEnum):
    """Packet types, section 2.1.2."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


class ReasonCode(IntEnum):
    """The reason codes that this broker sends or acts on, section 2.4."""

    SUCCESS = 0x00
    WITH_WILL = 0x04
    NO_SUBSCRIPTION = 0x11
    MALFORMED = 0x81
    PROTOCOL_ERROR = 0x82
    UNSUPPORTED_VERSION = 0x84
    BAD_CLIENT_ID = 0x85
    BAD_LOGIN = 0x86
    NOT_AUTHORISED = 0x87
    SERVER_BUSY = 0x89
    SHUTTING_DOWN = 0x8B
    BAD_AUTHENTICATION = 0x8C
    KEEP_ALIVE = 0x8D
    TAKEN_OVER = 0x8E
    BAD_FILTER = 0x8F
    BAD_TOPIC = 0x90
    UNKNOWN_ID = 0x92
    RECEIVE_MAXIMUM = 0x93
    TOPIC_ALIAS = 0x94
    TOO_LARGE = 0x95
    QUOTA = 0x97


class MqttError(Exception):
    """A protocol error, after which the connection must end with `reason`."""

    def __init__(self, reason: ReasonCode, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Property(IntEnum):
    """The identifiers of properties, section 2.2.2.2."""

    PAYLOAD_FORMAT = 1
    MESSAGE_EXPIRY = 2
    CONTENT_TYPE = 3
    RESPONSE_TOPIC = 8
    CORRELATION = 9
    SUBSCRIPTION_ID = 11
    SESSION_EXPIRY = 17
    ASSIGNED_ID = 18
    SERVER_KEEP_ALIVE = 19
    AUTH_METHOD = 21
    AUTH_DATA = 22
    REQUEST_PROBLEM = 23
    WILL_DELAY = 24
    REQUEST_RESPONSE = 25
    RESPONSE_INFORMATION = 26
    SERVER_REFERENCE = 28
    REASON_STRING = 31
    RECEIVE_MAXIMUM = 33
    TOPIC_ALIAS_MAXIMUM = 34
    TOPIC_ALIAS = 35
    MAXIMUM_QOS = 36
    RETAIN_AVAILABLE = 37
    USER = 38
    MAXIMUM_PACKET = 39
    WILDCARDS = 40
    SUBSCRIPTION_IDS = 41
    SHARED = 42


class BrokerMessage(NamedTuple):
    """A message to publish.

    `extras` are the encoded properties that are forwarded unchanged. `expires_s` is in seconds on the broker's clock;
    None: never.
    """

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    extras: bytes = b""
    expires_s: float | None = None


class Publish(NamedTuple):
    """A PUBLISH as it was received. `number` is its packet identifier, 0 at QoS 0."""

    message: BrokerMessage
    number: int
    duplicate: bool


class Connect(NamedTuple):
    """A CONNECT as it was received.

    `receive_maximum` and `max_packet_bytes` limit what the client may be sent (None: no limit).
    """

    version: int
    client_id: str
    clean: bool
    keep_alive_s: int
    username: str | None
    password: bytes | None
    will: BrokerMessage | None
    receive_maximum: int
    max_packet_bytes: int | None


class Asked(NamedTuple):
    """One filter of a SUBSCRIBE with its options (3.8.3.1) and its subscription identifier."""

    pattern: str
    qos: int
    no_local: bool = False
    as_published: bool = False
    handling: int = 0
    number: int | None = None
