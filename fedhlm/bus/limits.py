"""The limits of a broker, as stated in its CONNACK (MQTT 5, section 3.2.2.3) or learnt from its behaviour."""

from typing import Any, NamedTuple, Self

from fedhlm.bus import reasons


class Limits(NamedTuple):
    """What a broker offers.

    The largest packet in bytes (None: unknown), most messages in flight, the highest QoS, whether it retains messages,
    and whether filters may have wildcards.
    """

    max_packet_bytes: int | None = None
    receive_maximum: int = 65_535
    max_qos: int = 2
    retains: bool = True
    wildcards: bool = True

    @classmethod
    def of(cls, properties: Any) -> Self:
        """Read the limits from the properties of a CONNACK; pass None for MQTT 3.1.1, which has no properties."""
        return cls(
            getattr(properties, "MaximumPacketSize", None),
            getattr(properties, "ReceiveMaximum", 65_535),
            getattr(properties, "MaximumQoS", 2),
            bool(getattr(properties, "RetainAvailable", 1)),
            bool(getattr(properties, "WildcardSubscriptionAvailable", 1)),
        )

    def without(self, refusal: int | None) -> Self:
        """Lower the limits after a rejected CONNECT, whose reason code is `refusal`.

        The last will travels in the CONNECT itself, before the broker can state a limit on QoS or retained messages.
        """
        if refusal == reasons.QOS_UNAVAILABLE and self.max_qos:
            return self._replace(max_qos=0)
        if refusal == reasons.RETAIN_UNAVAILABLE and self.retains:
            return self._replace(retains=False)
        return self

    def at_most(self, packet_bytes: int) -> Self:
        """Return these limits with packets of at most `packet_bytes`."""
        known = self.max_packet_bytes
        return self._replace(max_packet_bytes=packet_bytes if known is None else min(known, packet_bytes))
