"""An MQTT broker inside the process, for machines without one: versions 3.1.1 and 5.

It has neither persistence nor TLS, and is meant for a demo, a test or a single machine. Without users it listens on
loopback addresses only. `python -m edge_broker.embedded --port 1883` runs it alone and prints its URL.
"""

import argparse
import asyncio
import ipaddress
import os
import signal
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

from edge_broker.mqtt.server import Counts, Server
from fedhlm.errors import ConfigError


class EmbeddedBroker:
    """A broker on `host:port`. Port 0 picks a free port; `port` and `url` are final once the context is entered.

    `users` maps names to passwords. Without users everybody on this machine may connect, and nobody else. `limits` are
    passed to `Server`.

    Raises:
        ConfigError: `host` is neither an IPv4 address nor localhost, or others can reach it and there are no users.
        ConfigError: the address cannot be bound (on entering).
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, users: Mapping[str, str] | None = None, **limits: Any
    ) -> None:
        address = _ipv4(host)
        if not users and not address.is_loopback:
            raise ConfigError("broker.host", host, "a loopback address unless there are users with passwords")
        self.host: Final = host
        self.port = port
        self._address = str(address)
        self._users = dict(users or {})
        self._limits = limits
        self._server: Server | None = None

    @property
    def url(self) -> str:
        """The URL to which clients connect, without credentials."""
        return f"mqtt://{self.host}:{self.port}"

    @property
    def counts(self) -> Counts:
        """The broker's counts since its last start."""
        return self._server.counts if self._server is not None else Counts()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start to listen. After `stop` the same port is used again, and retained messages are lost.

        Raises:
            ConfigError: the address cannot be bound.
        """
        server = Server(users=self._users, **self._limits)
        try:
            await server.start(self._address, self.port)
        except OSError as exc:
            why = os.strerror(exc.errno or 0)
            raise ConfigError("edge.embedded_port", self.port, f"a port that is free on {self.host}", why=why) from exc
        self._server = server
        self.port = server.port

    async def stop(self) -> None:
        """Disconnect all clients and stop listening."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop()


async def serve_forever(host: str = "127.0.0.1", port: int = 0, *, ready: Callable[[str], None] | None = None) -> None:
    """Run a broker until SIGTERM or SIGINT. `ready` is called with the URL once clients can connect."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with EmbeddedBroker(host, port) as broker:
        if ready is not None:
            ready(broker.url)
        await stop.wait()


def _ipv4(host: str) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError as exc:
        raise ConfigError("broker.host", host, "localhost or an IPv4 address") from exc


def main() -> None:
    """Run a broker alone."""
    parser = argparse.ArgumentParser(
        prog="python -m edge_broker.embedded", description="MQTT broker, versions 3.1.1 and 5"
    )
    parser.add_argument("--host", default="127.0.0.1", help="loopback address to listen on")
    parser.add_argument("--port", type=int, default=1883, help="port, 0 for a free one")
    options = parser.parse_args()
    asyncio.run(serve_forever(options.host, options.port, ready=lambda url: print(url, flush=True)))


if __name__ == "__main__":
    main()
