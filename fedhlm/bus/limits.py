"""What a broker takes, as its CONNACK says (MQTT 5, section 3.2.2.3) or as its behaviour showed."""

from typing import Any, NamedTuple, Self

from fedhlm.bus import reasons


class Limits(NamedTuple):
    """Largest packet in bytes (None: not known), messages under way at once, highest QoS, and whether it retains."""

    max_packet_bytes: int | None = None
    receive_maximum: int = 65_535
    max_qos: int = 2
    retains: bool = True

    @classmethod
    def of(cls, properties: Any) -> Self:
        """The limits of a CONNACK's properties; None for MQTT 3.1.1, which has none."""
        return cls(
            getattr(properties, "MaximumPacketSize", None),
            getattr(properties, "ReceiveMaximum", 65_535),
            getattr(properties, "MaximumQoS", 2),
            bool(getattr(properties, "RetainAvailable", 1)),
        )

    def without(self, refusal: int | None) -> Self:
        """What a refusal of our CONNECT says besides: the last will is sent with the connection, before any limit is told."""
        if refusal == reasons.QOS_UNAVAILABLE and self.max_qos:
            return self._replace(max_qos=0)
        if refusal == reasons.RETAIN_UNAVAILABLE and self.retains:
            return self._replace(retains=False)
        return self

    def at_most(self, packet_bytes: int) -> Self:
        """The same with no larger packets than this."""
        known = self.max_packet_bytes
        return self._replace(max_packet_bytes=packet_bytes if known is None else min(known, packet_bytes))
