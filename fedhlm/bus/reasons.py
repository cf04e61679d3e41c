"""The reason codes with which a broker ends a connection (MQTT 5, section 3.14.2.1), with words and advice."""

from typing import Final, NamedTuple


class Reason(NamedTuple):
    """Words for a reason code, and advice. The advice is empty where one can only wait."""

    words: str
    advice: str = ""


PROTOCOL_ERROR: Final = 0x82
TAKEN_OVER: Final = 0x8E
TOO_LARGE: Final = 0x95
RETAIN_UNAVAILABLE: Final = 0x9A
QOS_UNAVAILABLE: Final = 0x9B

_REPORT: Final = "look at the broker's log, and report it"
_SLOWER: Final = "raise the broker's limits, or send less"
REASONS: Final[dict[int, Reason]] = {
    0x00: Reason("normal disconnection"),
    0x80: Reason("unspecified error", "look at the broker's log"),
    0x81: Reason("malformed packet", _REPORT),
    PROTOCOL_ERROR: Reason("protocol error", _REPORT),
    0x83: Reason("implementation specific error", "look at the broker's log"),
    0x87: Reason("not authorised", "make new access rules for the broker (fedhlm pki mosquitto)"),
    0x89: Reason("server busy", "give the broker more resources, or fewer clients"),
    0x8B: Reason("server shutting down"),
    0x8D: Reason("keep alive timeout", "raise broker.keepalive_s where the link is slow"),
    TAKEN_OVER: Reason(
        "session taken over",
        "another client uses the same client id or certificate: give each part a name of its own (agent.id, "
        "cluster.name)",
    ),
    0x8F: Reason("topic filter invalid", _REPORT),
    0x90: Reason("topic name invalid", _REPORT),
    0x91: Reason("packet identifier in use", _REPORT),
    0x93: Reason("receive maximum exceeded", _REPORT),
    0x94: Reason("topic alias invalid", _REPORT),
    TOO_LARGE: Reason(
        "packet too large", "raise the broker's largest packet (mosquitto: max_packet_size, message_size_limit)"
    ),
    0x96: Reason("message rate too high", _SLOWER),
    0x97: Reason("quota exceeded", _SLOWER),
    0x98: Reason("administrative action", "ask the broker's operator"),
    0x99: Reason("payload format invalid", _REPORT),
    RETAIN_UNAVAILABLE: Reason("retain not supported", "enable retained messages at the broker: presence needs them"),
    QOS_UNAVAILABLE: Reason("QoS not supported", "enable QoS 1 at the broker"),
    0x9C: Reason("use another server", "correct broker.url"),
    0x9D: Reason("server moved", "correct broker.url"),
    0x9E: Reason("shared subscriptions not supported", _REPORT),
    0x9F: Reason("connection rate exceeded", _SLOWER),
    0xA0: Reason("maximum connect time"),
    0xA1: Reason("subscription identifiers not supported", _REPORT),
    0xA2: Reason(
        "wildcard subscriptions not supported", "enable wildcards at the broker: the edge and the cloud need them"
    ),
}


def described(code: int) -> str:
    """Describe a reason code: its words, its number and the advice."""
    reason = REASONS.get(code, Reason("unknown reason", "look at the broker's log"))
    return f"{reason.words} (reason code 0x{code:02X})" + (f"; {reason.advice}" if reason.advice else "")
