"""Opens connections to a broker: MQTT 5 or 3.1.1, within the broker's limits, telling final from passing errors."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final, Literal

import aiomqtt
import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fedhlm.bus.aiomqtt_patches import ClosedEarlyError, PatchedClient, RefusedMessage, drop, enter_quietly, funnel
from fedhlm.bus.broker_url import BrokerUrl, tls_refusal
from fedhlm.bus.gate import Sheds
from fedhlm.bus.interface import MAX_PACKET_BYTES, ProtocolVersion, Retained
from fedhlm.bus.limits import Limits
from fedhlm.errors import BusError
from fedhlm.telemetry import warn_once

_log: Final = logging.getLogger(__name__)

REPLY_TIMEOUT_S: Final = 10.0
TCP_TIMEOUT_S: Final = 5.0
MAX_IN_FLIGHT: Final = 64

_UNSUPPORTED_PROTOCOL: Final = 132
_FINAL_REFUSALS: Final = {133: "client id not valid", 134: "bad user name or password", 135: "not authorised",
                          138: "banned", 140: "bad authentication method"}  # fmt: skip


class Dialler:
    """Opens connections of one client id to one broker.

    `limits` are the broker's limits of the last connection, lowered by what was learnt since. Incoming messages go to
    `take`, except those that `sheds` drops. `on_refused` is called for messages that the broker rejects.
    """

    def __init__(
        self,
        url: BrokerUrl,
        client_id: str,
        *,
        will: Retained | None,
        protocol: Literal["auto", "5", "3.1.1"],
        keepalive_s: int,
        take: Callable[[aiomqtt.Message], None],
        on_refused: Callable[[RefusedMessage], None],
        sheds: Sheds,
    ) -> None:
        self.protocol: ProtocolVersion | None = None if protocol == "auto" else protocol
        self.limits = Limits()
        self._url, self._client_id = url, client_id
        self._ssl = url.ssl_context()
        self._will = will
        self._keepalive_s = keepalive_s
        self._take, self._on_refused, self._sheds = take, on_refused, sheds
        self._learnt_max: int | None = None
        self._ever_connected = False

    def learn_largest(self, packet_bytes: int) -> None:
        """Lower the largest packet to `packet_bytes` from now on, whatever the broker states."""
        self._learnt_max = packet_bytes
        self.limits = self.limits.at_most(packet_bytes)

    async def connect(self, group: asyncio.TaskGroup) -> PatchedClient:
        """Return a connected client that speaks the newest protocol version the broker accepts.

        Raises:
            BusError: the broker rejects the connection for good. Only before the first successful connection.
            aiomqtt.MqttError: the connection failed for now; a later attempt may succeed.
        """
        candidates: tuple[ProtocolVersion, ...] = ("5", "3.1.1") if self.protocol is None else (self.protocol,)
        for version in candidates:
            client = self._make_client(version)
            error = await self._enter(client, group)
            if error is None:
                self.protocol = version
                self._ever_connected = True
                limits = Limits.of(client.connack)
                self.limits = limits if self._learnt_max is None else limits.at_most(self._learnt_max)
                return client
            if (refusal := tls_refusal(str(error))) is not None:
                if not self._ever_connected:
                    raise BusError(f"broker {self._url} {refusal}") from error
                # The loss of the link has been logged already. This is the reason why it will not recover by itself.
                warn_once(_log, f"{self._client_id} {refusal}", "%s: %s %s", self._client_id, self._url, refusal)
                raise error
            code = getattr(getattr(error, "rc", None), "value", None)
            self.limits = self.limits.without(code)
            too_new = code == _UNSUPPORTED_PROTOCOL or isinstance(error, ClosedEarlyError)
            if too_new and version != candidates[-1]:
                continue
            if code in _FINAL_REFUSALS and not self._ever_connected:
                raise BusError(f"broker {self._url} refused: {_FINAL_REFUSALS[code]}") from error
            raise error
        raise AssertionError("unreachable: the last candidate returns or raises")

    def _make_client(self, version: ProtocolVersion) -> PatchedClient:
        five = version == "5"
        qos, retain = min(1, self.limits.max_qos), self.limits.retains
        will = self._will and aiomqtt.Will(self._will.topic, self._will.payload, qos=qos, retain=retain)
        client = PatchedClient(
            self._url.host,
            self._url.port,
            on_refused=self._on_refused,
            username=self._url.username,
            password=self._url.password,
            identifier=self._client_id,
            protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
            will=will,
            clean_session=None if five else True,
            clean_start=True if five else paho.MQTT_CLEAN_START_FIRST_ONLY,
            timeout=REPLY_TIMEOUT_S,
            keepalive=self._keepalive_s,
            queue_type=funnel(self._take),
            properties=_offer() if five else None,
            max_inflight_messages=MAX_IN_FLIGHT,
            tls_context=self._ssl,
            # Our packets are small and urgent. With Nagle's algorithm each could wait for the peer's delayed ACK.
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        client.pending_calls_threshold = 2 * MAX_IN_FLIGHT
        client.set_tcp_timeout(TCP_TIMEOUT_S)
        client.acknowledge_at_once()
        client.take_strange_reasons()
        client.read_ahead(self._sheds)
        return client

    async def _enter(self, client: PatchedClient, group: asyncio.TaskGroup) -> aiomqtt.MqttError | None:
        """Connect and return the error, if any. A cancellation waits until paho's thread has opened the connection."""
        attempt = group.create_task(enter_quietly(client), name=f"bus {self._client_id} connect")
        try:
            error = await asyncio.shield(attempt)
        except asyncio.CancelledError:
            opened = group.create_task(client.opened.wait(), name=f"bus {self._client_id} opened")
            await asyncio.wait({attempt, opened}, return_when=asyncio.FIRST_COMPLETED)
            opened.cancel()
            attempt.cancel()
            await asyncio.wait({attempt, opened})
            drop(client)
            raise
        if error is not None:
            drop(client)
        return error


def _offer() -> Properties:
    """CONNECT properties that tell the broker our largest packet: it drops larger ones for us."""
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = MAX_PACKET_BYTES
    return properties
