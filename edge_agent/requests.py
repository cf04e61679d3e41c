"""The prompts that an agent serves or refuses: their names, their order, and cancellations. No I/O."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from edge_agent.events import Committed, Judged
from fedhlm.answering import Slice, TokenOrigin
from fedhlm.protocol.fields import FinishReason, Refusal
from fedhlm.protocol.messages import Cancel, Presence, Prompt
from fedhlm.spans import NO_SPAN, Tracer

PROMPTS_MAX: Final = 256
CLIENT_MAX: Final = 192  # per client, so that the other places are left for others
REQUESTS_REMEMBERED: Final = 1_024


class End(NamedTuple):
    """How a request ends that is not served, or not completely."""

    finish: FinishReason
    error: str
    refusal: Refusal | None = None


class RoutedPrompt:
    """A prompt, and the cluster through which it came and to which its output goes.

    `began_s` is when the prompt came, and `limit_s` when the client stops waiting, in seconds on the agent's clock. `count` is the number of tokens
    published, `over` is how the request ends before its text is whole, and `answered` says that the last output has
    been published.

    A client on the agent's own machine gives the prompt as `ids`. Its output goes to `tell` and not to the bus.
    `context` is that of the client's span, and `span` the request's own.
    """

    def __init__(
        self,
        cluster: str,
        prompt: Prompt,
        now_s: float = 0.0,
        *,
        ids: Sequence[int] | None = None,
        tell: Callable[[Slice], object] | None = None,
        context: str = "",
    ) -> None:
        self.cluster = cluster
        self.prompt = prompt
        self.ids = ids
        self.tell = tell
        self.context = context
        self.span = NO_SPAN
        self._judged: dict[int, Judged] = {}  # by position in the answer
        self.began_s = now_s
        self.limit_s = float("inf") if prompt.patience_ms is None else now_s + prompt.patience_ms / 1000.0
        self.count = 0
        self.over: End | None = None
        self.answered = False

    def trace(self, tracer: Tracer) -> None:
        """Begin the request's span."""
        self.span = tracer.begin("request", "server", self.context, request=self.prompt.request)

    def judged(self, judged: Judged) -> None:
        """Remember the device's draft for a position, for the origin of the token there."""
        if self.ids is not None:
            self._judged[judged.position - len(self.ids)] = judged

    def origins(self, tokens: Sequence[Committed]) -> tuple[TokenOrigin, ...]:
        """Who decided each of the tokens that are about to be told."""
        found = []
        for position, (token, source, _) in enumerate(tokens, start=self.count):
            judged = self._judged.pop(position, None)
            replaced = judged is not None and judged.own != token
            if replaced:  # what was drafted behind it belongs to another text
                self._judged.clear()
            doubt, draft = (None, None) if judged is None else (judged.uncertainty, judged.own)
            found.append(TokenOrigin(token, source, doubt, draft if replaced else None))
        return tuple(found)


CANCELLED: Final = End("cancelled", "cancelled by its client")
GONE: Final = End("cancelled", "its client went offline")
LATE: Final = End("error", "its deadline passed while it waited for its turn", "late")
LATE_TEXT: Final = End("cancelled", "its deadline passed before the text was whole")

_K = TypeVar("_K")
_V = TypeVar("_V")
_Mark = tuple[str, int, int]  # sender, sequence number and time of a prompt: equal only for an MQTT duplicate


class Requests:
    """The requests of the agent `agent`: those that wait or are being served, and the names of earlier ones."""

    def __init__(self, agent: str) -> None:
        self.open: dict[str, RoutedPrompt] = {}  # in order of arrival
        self._served: OrderedDict[str, None] = OrderedDict()  # clients, the one that was served longest ago first
        self._agent = agent
        self._names: OrderedDict[str, _Mark] = OrderedDict()
        self._withdrawn: OrderedDict[tuple[str, str], None] = OrderedDict()

    def __len__(self) -> int:
        """How many names and cancellations are remembered."""
        return len(self._names) + len(self._withdrawn)

    def knows(self, prompt: Prompt) -> bool:
        """Whether this same prompt has arrived before, since MQTT may deliver it twice."""
        return self._names.get(prompt.request) == _mark(prompt)

    def admit(self, request: RoutedPrompt) -> End | None:
        """Add a new request, or return how it ends at once."""
        prompt = request.prompt
        if prompt.request in self._names:
            return End("error", f"request name {prompt.request} is in use: choose another one", "taken")
        if sum(waiting.prompt.sender == prompt.sender for waiting in self.open.values()) >= CLIENT_MAX:
            return End("error", f"{prompt.sender} has {CLIENT_MAX} prompts waiting: ask later", "busy")
        if len(self.open) >= PROMPTS_MAX:
            return End("error", f"agent {self._agent} has {PROMPTS_MAX} prompts waiting: ask later", "busy")
        _remember(self._names, prompt.request, _mark(prompt))
        if self._withdrawn.pop((prompt.sender, prompt.request), 0) is None:  # the cancellation overtook its prompt
            return CANCELLED
        self.open[prompt.request] = request
        return None

    def take_turn(self) -> RoutedPrompt | None:
        """The next request to serve. Clients take turns, and each client's prompts are served in order of arrival."""
        oldest: dict[str, RoutedPrompt] = {}
        for request in self.open.values():
            oldest.setdefault(request.prompt.sender, request)
        if not oldest:
            return None
        new = next((client for client in oldest if client not in self._served), None)
        client = next(c for c in self._served if c in oldest) if new is None else new
        self._served.pop(client, None)
        _remember(self._served, client, None)
        return oldest[client]

    def cancel(self, message: Cancel) -> RoutedPrompt | None:
        """The open request that a client cancels; None if there is none of this client."""
        request = self.open.get(message.request)
        if request is not None and request.prompt.sender == message.sender:
            return request
        if message.request not in self._names:
            _remember(self._withdrawn, (message.sender, message.request), None)
        return None

    def gone(self, client: Presence, *, retained: bool) -> list[RoutedPrompt]:
        """The open requests of a connection that has ended; none while the client is online.

        A retained presence tells of an earlier time. Without the name of a connection it may tell of another one.
        """
        if client.online or (retained and client.connection is None):
            return []
        who = client.sender, client.connection
        return [r for r in self.open.values() if (r.prompt.sender, r.prompt.connection) == who]

    def close(self, request: RoutedPrompt) -> None:
        """Remove a request that has had its last output."""
        if self.open.get(request.prompt.request) is request:
            del self.open[request.prompt.request]


def _mark(prompt: Prompt) -> _Mark:
    return prompt.sender, prompt.sequence, prompt.sent_ms


def _remember(memory: "OrderedDict[_K, _V]", key: _K, value: _V) -> None:
    memory[key] = value
    while len(memory) > REQUESTS_REMEMBERED:
        memory.popitem(last=False)
