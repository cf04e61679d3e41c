"""What a service manager is told: ready, alive, stopping, and one line of status. The protocol is systemd's sd_notify.

Without NOTIFY_SOCKET everything here does nothing. A ping says that the event loop turns: it must come from the loop.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from typing import Final, Self

from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

# Where no watchdog is set, pings only stretch the time allowed for starting; twice as often as that time runs out.
DEFAULT_SPAN_S: Final = 30.0
_SEND_TIMEOUT_S: Final = 1.0
_MICROSECONDS: Final = 1_000_000


class Notifier:
    """Speaks to the manager at `address` (None: to nobody). A ping is due within `watchdog_s` seconds (0: none is)."""

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
        """As the environment says; `pid` is ours, and a watchdog that is meant for another process is not ours."""
        address = environ.get("NOTIFY_SOCKET") or None
        meant_for = environ.get("WATCHDOG_PID", "")
        ours = not meant_for or meant_for == str(os.getpid() if pid is None else pid)
        span = environ.get("WATCHDOG_USEC", "")
        watched = ours and span.isascii() and span.isdigit()
        return cls(address, int(span) / _MICROSECONDS if watched else 0.0)

    @property
    def managed(self) -> bool:
        """Whether somebody listens."""
        return self.address is not None

    def send(self, **fields: str | int) -> bool:
        """Send `FIELD=value` lines in one datagram; False without a manager, or when it cannot be reached (a warning)."""
        if self.address is None:
            return False
        # One line for each field: a newline in a value would begin another one.
        text = "\n".join(f"{name}={' '.join(str(value).split())}" for name, value in fields.items())
        try:
            if self.address[0] not in "@/":
                raise OSError(f"NOTIFY_SOCKET must be a path or @name (got {self.address!r})")
            # An abstract socket's name begins with a zero byte, which an environment variable cannot hold.
            place = "\0" + self.address[1:] if self.address[0] == "@" else self.address
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(_SEND_TIMEOUT_S)
                channel.sendto(text.encode(), place)
        except OSError as exc:
            warn_once(log, "notify", "the service manager cannot be told %s: %s", next(iter(fields), ""), exc)
            return False
        return True

    def serving(self) -> None:
        """To be called when the service takes what comes: from now on it is ready whenever its needed links are up."""
        self._serving = True
        self._tell()

    def stopping(self) -> None:
        """Say that the service is on its way out, as it was asked to; the last status."""
        self._stopping = True
        self.send(STOPPING=1, STATUS="stopping")

    def ping(self) -> None:
        """Say that we live. While the service still starts this asks for more time, so that a broker may come late."""
        if not self.ready_sent:
            self.send(EXTEND_TIMEOUT_USEC=int(self._span_s * _MICROSECONDS))
        if self.watchdog_s:
            self.send(WATCHDOG=1)

    async def keep_alive(self) -> None:
        """Ping twice within each span, until cancelled. Without a manager it ends at once."""
        while self.managed:
            self.ping()
            await asyncio.sleep(self._span_s / 2.0)

    def link(
        self, name: str, *, needed: bool = True, then: Callable[[bool], object] | None = None
    ) -> Callable[[bool], None]:
        """A hook for `bus.LinkHook`. Ready needs every `needed` link; the status names all that are down.

        Each hook of one `name` is one connection, and the link is up while any of them is. `then` is called after it with the
        same.
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
