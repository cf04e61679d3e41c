"""amqtt as we need it: users with passwords, and no connection left open after its session has ended.

Imported only by `embedded`, when a broker is started.
"""

import asyncio
import hmac
from dataclasses import dataclass, field
from typing import Any

from amqtt.broker import Broker
from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session

STOP_TIMEOUT_S = 1.0


class UserAuth(BaseAuthPlugin):  # type: ignore[misc]
    """Without users everybody passes; with users the password must match. amqtt loads it by its dotted path."""

    @dataclass
    class Config:
        """`users` maps names to passwords."""

        users: dict[str, str] = field(default_factory=dict)

    async def authenticate(self, *, session: Session) -> bool:
        """Whether the connecting session may stay."""
        users: dict[str, str] = self.config.users
        if not users:
            # amqtt then keeps nothing for it after a disconnect, which is what a clean session asks for.
            session.is_anonymous = True
            return True
        expected = users.get(session.username or "")
        given = (session.password or "").encode()
        return expected is not None and hmac.compare_digest(given, expected.encode())


class TrackedBroker(Broker):  # type: ignore[misc]
    """Closes every connection for sure: amqtt forgets to when a client resets it while something is being written."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    @property
    def port(self) -> int:
        """The TCP port in use."""
        port: int = self._servers["default"].instance.sockets[0].getsockname()[1]
        return port

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        """Serve one client until it leaves."""
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            await super().stream_connected(reader, writer, listener_name)
        finally:
            writer.close()
            del self._connections[task]

    async def shutdown(self) -> None:
        """Stop, and end what still hangs on a connection."""
        await super().shutdown()
        if self._connections:
            _, hanging = await asyncio.wait(list(self._connections), timeout=STOP_TIMEOUT_S)
            for task in hanging:
                self._connections[task].transport.abort()
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)
        # Closing a transport takes one more turn of the loop.
        await asyncio.sleep(0)
