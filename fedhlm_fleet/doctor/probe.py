"""A short MQTT session of the doctor, which shows what the bus hides: the reason code of every answer.

It has its own client id, no last will and a clean start, so that it does not disturb a running part.
"""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.bus.interface import ProtocolVersion
from fedhlm.errors import BusError

FIRST_FAILURE: Final = 128
WRITTEN_S: Final = 0.03
POLL_S: Final = 0.002
UNSUPPORTED: Final = 132
_PAHO: Final[dict[ProtocolVersion, Any]] = {"5": paho.MQTTv5, "3.1.1": paho.MQTTv311}


class HeardMessage(NamedTuple):
    """A received message, with the local time of its arrival."""

    topic: str
    payload: bytes
    retain: bool
    wall_s: float


class LostError(BusError):
    """The broker closed an established session."""


class RefusedError(BusError):
    """The broker rejected the CONNECT."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


class Probe:
    """An open session. Every wait ends after `wait_s` seconds at the latest."""

    def __init__(
        self, address: BrokerUrl, client_id: str, *, key: str, wait_s: float, wall_s: Callable[[], float] = time.time
    ) -> None:
        self.heard: list[HeardMessage] = []
        self.version: ProtocolVersion = "5"
        self._address, self._client_id, self._wait_s, self._wall_s = address, client_id, wait_s, wall_s
        self._context = address.ssl_context(key=key)
        self._changed = threading.Condition()
        self._connected: Any = None
        self._gone: Any = None
        self._answers: dict[int, list[Any]] = {}
        self._client: paho.Client | None = None

    def open(self, versions: tuple[ProtocolVersion, ...] = ("5", "3.1.1")) -> None:
        """Connect with the newest of `versions` that the broker speaks.

        Raises:
            RefusedError: the broker rejects the connection.
            BusError: the broker does not answer, or closes the connection.
        """
        for version in versions:
            self.version = version
            self._connect(version)
            code = None if self._connected is None else self._connected.value
            if code == 0:
                return
            self.close()
            if version != versions[-1] and (code == UNSUPPORTED or (code is None and self._gone is not None)):
                continue
            if code is not None:
                raise RefusedError(str(self._connected), code)
            raise self._lost()

    def _connect(self, version: ProtocolVersion) -> None:
        self._connected = self._gone = None
        client = paho.Client(
            CallbackAPIVersion.VERSION2, self._client_id, protocol=_PAHO[version], reconnect_on_failure=False
        )
        client.connect_timeout = self._wait_s
        if self._address.username is not None:
            client.username_pw_set(self._address.username, self._address.password)
        if self._context is not None:
            client.tls_set_context(self._context)
        client.on_connect = lambda _c, _u, _f, reason, _p: self._note("_connected", reason)
        client.on_disconnect = lambda _c, _u, _f, reason, _p: self._note("_gone", reason)
        client.on_subscribe = lambda _c, _u, mid, reasons, _p: self._answer(mid, list(reasons))
        client.on_unsubscribe = lambda _c, _u, mid, reasons, _p: self._answer(mid, list(reasons))
        client.on_publish = lambda _c, _u, mid, reason, _p: self._answer(mid, [reason])
        client.on_message = lambda _c, _u, message: self._hear(message)
        self._client = client
        try:
            client.connect(self._address.host, self._address.port, keepalive=30)
        except OSError as exc:
            raise BusError(f"no connection: {exc.strerror or exc}") from exc
        client.loop_start()
        self._until(lambda: self._connected is not None or self._gone is not None)

    def subscribe(self, *filters: str) -> dict[str, str]:
        """Subscribe at QoS 1; return the refused filters with the broker's reasons.

        Raises:
            BusError: no answer.
        """
        reasons = self._ask(lambda client: client.subscribe([(pattern, 1) for pattern in filters]))
        return {p: str(r) for p, r in zip(filters, reasons, strict=True) if r.value >= FIRST_FAILURE}

    def publish(self, topic: str, payload: bytes) -> str | None:
        """Publish at QoS 1, not retained; return the broker's reason for refusing, or None.

        Raises:
            BusError: the broker does not answer.
        """

        def send(client: paho.Client) -> tuple[Any, int | None]:
            info = client.publish(topic, payload, qos=1)
            return info.rc, info.mid

        (reason,) = self._ask(send)
        return str(reason) if reason.value >= FIRST_FAILURE else None

    def burst_s(self, count: int) -> float:
        """Send `count` requests in one TCP segment, and return the seconds until the last one is answered.

        The requests end subscriptions that do not exist, so they have no effect. The answers are several segments, and
        the kernel delays its acknowledgements, as for most clients. A broker with Nagle's algorithm waits for that
        acknowledgement before it sends the second answer. Only Linux sends the requests in one segment.

        Raises:
            BusError: the broker does not answer.
        """
        client = self._client
        sock = None if client is None else client.socket()
        if client is None or sock is None:
            raise self._lost()
        options: Any = sock
        quick, cork = getattr(socket, "TCP_QUICKACK", None), getattr(socket, "TCP_CORK", None)
        if quick is not None:
            options.setsockopt(socket.IPPROTO_TCP, quick, 0)
        if cork is not None:
            options.setsockopt(socket.IPPROTO_TCP, cork, 1)
        numbers = [client.unsubscribe(f"doctor/{self._client_id}")[1] for _ in range(count)]
        latest_s = time.perf_counter() + self._wait_s
        while client.want_write() and time.perf_counter() < latest_s:
            time.sleep(POLL_S)
        time.sleep(WRITTEN_S)  # paho's thread has written the last one by then
        begun_s = time.perf_counter()
        if cork is not None:
            options.setsockopt(socket.IPPROTO_TCP, cork, 0)
        self._until(lambda: all(n in self._answers for n in numbers) or self._gone is not None)
        took_s = time.perf_counter() - begun_s
        if any(n is None or self._answers.pop(n, None) is None for n in numbers):
            raise self._lost()
        return took_s

    def wait_for(self, wanted: Callable[[HeardMessage], bool], wait_s: float) -> HeardMessage | None:
        """Return the first wanted message among those received so far or within `wait_s` seconds, or None."""
        self._until(lambda: any(map(wanted, self.heard)), wait_s)
        return next(filter(wanted, list(self.heard)), None)

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        client, self._client = self._client, None
        if client is not None:
            client.disconnect()
            client.loop_stop()

    def _ask(self, call: Callable[[paho.Client], tuple[Any, int | None]]) -> list[Any]:
        if self._client is None:
            raise BusError("the session is closed")
        code, number = call(self._client)
        if code != paho.MQTT_ERR_SUCCESS or number is None:
            raise LostError(f"the broker hung up: {paho.error_string(code)}")
        self._until(lambda: number in self._answers or self._gone is not None)
        if number not in self._answers:
            raise self._lost()
        return self._answers.pop(number)

    def _lost(self) -> BusError:
        if self._gone is None:
            return BusError(f"no answer within {self._wait_s:g} s")
        return LostError(f"the broker hung up: {self._gone}")

    def _until(self, done: Callable[[], bool], wait_s: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(done, self._wait_s if wait_s is None else wait_s)

    def _note(self, attribute: str, value: object) -> None:
        with self._changed:
            setattr(self, attribute, value)
            self._changed.notify_all()

    def _answer(self, number: int, reasons: list[Any]) -> None:
        with self._changed:
            self._answers[number] = reasons
            self._changed.notify_all()

    def _hear(self, message: paho.MQTTMessage) -> None:
        with self._changed:
            self.heard.append(HeardMessage(message.topic, bytes(message.payload), message.retain, self._wall_s()))
            self._changed.notify_all()
