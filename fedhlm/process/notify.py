"""Messages to the service manager: ready, alive, stopping, and one line of status. The protocol is systemd's sd_notify.

Without NOTIFY_SOCKET nothing is sent. A ping shows that the event loop runs, so it must be sent from the loop.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from typing import Final, Self

from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

# Without a watchdog, pings only extend the time allowed for starting, each time by this many seconds.
DEFAULT_SPAN_S: Final = 30.0
_SEND_TIMEOUT_S: Final = 1.0
_MICROSECONDS: Final = 1_000_000


class Notifier:
    """Sends to the manager at `address` (None: no manager). It expects a ping every `watchdog_s` seconds (0: none)."""

    def __init__(self, address: str | None = None, watchdog_s: float = 0.0) -> None:
        self.address = address
        self.watchdog_s = watchdog_s
        self.ready_sent = False
        self._links: dict[str, int] = {}  # connections up, by name
        self._needed: set[str] = set()
        self._serving = False
        self._stopping = False

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ, pid: int | None = None) -> Self:
        """Make a notifier from the environment. A watchdog is ignored if it is not for `pid` (None: this process)."""
        address = environ.get("NOTIFY_SOCKET") or None
        meant_for = environ.get("WATCHDOG_PID", "")
        ours = not meant_for or meant_for == str(os.getpid() if pid is None else pid)
        span = environ.get("WATCHDOG_USEC", "")
        watched = ours and span.isascii() and span.isdigit()
        return cls(address, int(span) / _MICROSECONDS if watched else 0.0)

    @property
    def managed(self) -> bool:
        """Whether there is a service manager."""
        return self.address is not None

    def send(self, **fields: str | int) -> bool:
        """Send `FIELD=value` lines in one datagram. False without a manager, and with a warning if sending fails."""
        if self.address is None:
            return False
        # Each field takes one line; a newline in a value would begin another field.
        text = "\n".join(f"{name}={' '.join(str(value).split())}" for name, value in fields.items())
        try:
            if self.address[0] not in "@/":
                raise OSError(f"NOTIFY_SOCKET must be a path or @name (got {self.address!r})")
            # The name of an abstract socket begins with a zero byte, which an environment variable cannot hold.
            place = "\0" + self.address[1:] if self.address[0] == "@" else self.address
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(_SEND_TIMEOUT_S)
                channel.sendto(text.encode(), place)
        except OSError as exc:
            warn_once(log, "notify", "the service manager cannot be told %s: %s", next(iter(fields), ""), exc)
            return False
        return True

    def serving(self) -> None:
        """Call this when the part handles messages. From now on it is ready as soon as its needed links are up."""
        self._serving = True
        self._tell()

    def stopping(self) -> None:
        """Tell the manager that the part is stopping as requested. No status follows."""
        self._stopping = True
        self.send(STOPPING=1, STATUS="stopping")

    def ping(self) -> None:
        """Tell the manager that the part is alive. While it starts, ask for more time, as the broker may come late."""
        if not self.ready_sent:
            self.send(EXTEND_TIMEOUT_USEC=int(self._span_s * _MICROSECONDS))
        if self.watchdog_s:
            self.send(WATCHDOG=1)

    async def keep_alive(self) -> None:
        """Ping twice per span until cancelled. Without a manager this returns at once."""
        while self.managed:
            self.ping()
            await asyncio.sleep(self._span_s / 2.0)

    def link(
        self, name: str, *, needed: bool = True, then: Callable[[bool], object] | None = None
    ) -> Callable[[bool], None]:
        """Return a `LinkHook` for the link `name`. The part is ready when every `needed` link is up.

        The status names all links that are down. Each hook of one `name` is one connection, and the link is up while
        any of its connections is up. `then` is called afterwards with the same argument.
        """
        self._links.setdefault(name, 0)
        if needed:
            self._needed.add(name)

        def changed(up: bool) -> None:
            self._links[name] += 1 if up else -1
            self._tell()
            if then is not None:
                then(up)

        return changed

    @property
    def _span_s(self) -> float:
        return self.watchdog_s or DEFAULT_SPAN_S

    def _tell(self) -> None:
        if self._stopping:
            return
        down = [name for name, count in self._links.items() if count <= 0]
        well = "serving" if self._serving else "starting"
        status = f"no link to {' and '.join(down)}: trying again" if down else well
        if self.ready_sent or not self._serving or self._needed.intersection(down):
            self.send(STATUS=status)
        else:
            self.ready_sent = self.send(READY=1, STATUS=status)
