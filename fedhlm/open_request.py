"""A request of a client that is not finished, and waiting for what happens to it."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from fedhlm.answers import Assembly
from fedhlm.bus.interface import Extras
from fedhlm.errors import ConfigError
from fedhlm.protocol.messages import AnyMessage, Output, Prompt
from fedhlm.spans import extras_of, readable

LINGER_S: Final = 0.5


class OpenRequest:
    """A request that is not finished: its prompt's `fields`, its answer so far, and the time of the last piece.

    Raises:
        ConfigError: `traceparent`, the context of the caller's span, is neither empty nor W3C Trace Context.
    """

    def __init__(self, agent: str, cluster: str | None, fields: dict[str, Any], traceparent: str = "") -> None:
        self.agent = agent
        self.cluster = cluster
        self.request: str = fields["request"]
        self.fields = fields
        if traceparent and not readable(traceparent):
            raise ConfigError(
                "traceparent", traceparent, "VERSION-TRACE-SPAN-FLAGS in lower-case hexadecimal, or empty"
            )
        self.extras = extras_of([traceparent])
        self.assembly = Assembly()
        self.news = asyncio.Event()
        self.heard_s = 0.0
        self.sent = False
        self._window: asyncio.Semaphore | None = None

    def place(self, client: str) -> dict[str, str]:
        """The levels of the topics of this request."""
        return {"cluster": self.cluster or "", "agent": self.agent, "client": client}

    async def enter(self, window: asyncio.Semaphore, limit_s: float) -> bool:
        """Wait for a place in a window, at most until `limit_s` of the loop's clock. Return whether there is one."""
        try:
            async with asyncio.timeout_at(None if limit_s == float("inf") else limit_s):
                await window.acquire()
        except TimeoutError:
            return False
        self._window = window
        return now_s() < limit_s

    def leave(self) -> None:
        """Free the place in the window, a little later if the agent has not ended the request and must hear of its end.

        Else all requests that wait would be sent one after the other when many deadlines pass at once.
        """
        window, self._window = self._window, None
        if window is None:
            return
        if self.sent and self.assembly.last is None:
            asyncio.get_running_loop().call_later(LINGER_S, window.release)
        else:
            window.release()

    def take(self, output: Output) -> None:
        """Add one output of the answer."""
        if self.assembly.take(output):
            self.heard_s = now_s()
            self.news.set()


def extras_for(message: AnyMessage, requests: Mapping[str, OpenRequest]) -> Extras | None:
    """What a message carries besides its payload: a prompt the context of its caller's span."""
    state = requests.get(message.request) if isinstance(message, Prompt) else None
    return None if state is None else state.extras


def now_s() -> float:
    """The time of the running loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


async def within(event: asyncio.Event, limit_s: float) -> bool:
    """Wait for an event until a time of the loop's clock. Return whether it came."""
    try:
        async with asyncio.timeout_at(None if limit_s == float("inf") else limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
