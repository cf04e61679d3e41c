"""The exception hierarchy. Errors that a caller can handle are FedhlmErrors; any other exception is a bug.

FedhlmError
├── ConfigError        a key, its value and what it must be
│   └── UnknownKey     a key that does not exist, with the nearest one
├── DataMissing        training or benchmark data is not there
├── ModelError         a model folder is missing, incomplete or of the wrong kind
├── GrammarError       a grammar cannot be used, or no text can be held to it here
├── FingerprintMismatch  agent and cloud do not run the same tokenizer, vocabulary or sampler
├── ProtocolError      bytes on a topic are not a message of that topic
├── BusError           the broker cannot be reached, or rejects the connection
├── AskError           an answer is not complete (`fedhlm.Client`)
│   ├── AgentOffline       the agent is not connected to the broker
│   ├── DeadlinePassed     the answer, or its next piece, did not come in time
│   ├── PiecesLost         a piece of the answer was lost
│   ├── RequestCancelled   the client or the agent cancelled the request
│   ├── RequestNameTaken   the agent knows the request's name from another prompt
│   └── RequestRefused     the agent rejected the request or failed, and says why
├── A2aError           a request of another program over A2A cannot be served
├── ReceiptError       a receipt is not about its text, or its signature is wrong
└── TraceError         a recording cannot be read, written or used as asked
"""

from pathlib import PurePath


class FedhlmError(Exception):
    """Base class of every error that a caller can handle."""


class ConfigError(FedhlmError):
    """A setting or flag has a value that cannot be used: `KEY must be EXPECTED (got VALUE from SOURCE: WHY)`.

    `expectation` completes "must be". The value None means that there is no value. The caller masks secret values.
    """

    def __init__(self, key: str, value: object, expectation: str, *, why: str = "", source: str = "") -> None:
        self.key = key
        self.value = value
        self.expectation = expectation
        self.why = why
        self.source = source
        super().__init__(self._sentence())

    def _found(self) -> str:
        value = str(self.value) if isinstance(self.value, PurePath) else self.value
        found = "nothing" if value is None else repr(value)
        return f"{found}{f' from {self.source}' if self.source else ''}"

    def _sentence(self) -> str:
        return f"{self.key} must be {self.expectation} (got {self._found()}{f': {self.why}' if self.why else ''})"


class UnknownKey(ConfigError):
    """A key does not exist. `expectation` is a hint at the key that may be meant."""

    def _sentence(self) -> str:
        found = "" if self.value is None else f" (got {self._found()})"
        return f"{self.key} is not a known key: {self.expectation}{found}"


class DataMissing(FedhlmError):
    """Training or benchmark data is missing or malformed."""


class ModelError(FedhlmError):
    """A model folder cannot be used. The message names the file and what was expected."""


class GrammarError(FedhlmError):
    """A grammar is wrong, or the model cannot hold a text to one."""


class FingerprintMismatch(FedhlmError):
    """The fingerprints of two parties differ in a field that both must share."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"fingerprint.{field} differs: ours is {ours!r}, theirs is {theirs!r}")
        self.field = field
        self.ours = ours
        self.theirs = theirs


class ProtocolError(FedhlmError):
    """A payload is not a valid message for its topic."""


class BusError(FedhlmError):
    """The broker cannot be reached or rejected the connection, or the connection was closed."""


class AskError(FedhlmError):
    """The answer of `agent` to `request` is not complete. `reason` says why."""

    def __init__(self, agent: str, request: str, reason: str) -> None:
        super().__init__(reason)
        self.agent = agent
        self.request = request
        self.reason = reason


class AgentOffline(AskError):
    """The agent is not connected to the broker: it never connected, disconnected, or its last will was published."""


class DeadlinePassed(AskError):
    """The answer was not complete at its deadline, or no piece of it came for too long."""


class PiecesLost(AskError):
    """The piece that begins at token `position` did not come, although later pieces did."""

    def __init__(self, agent: str, request: str, position: int) -> None:
        super().__init__(agent, request, f"pieces of {agent}'s answer were lost from token {position} on")
        self.position = position


class RequestCancelled(AskError):
    """The client or the agent cancelled the request before its text was complete."""


class RequestNameTaken(AskError):
    """The agent knows the request's name from another prompt. Ask again under another name."""


class RequestRefused(AskError):
    """The agent ended the request with an error. `reason` is the agent's text."""


def root_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error inside nested groups, which is what to show of a task group that failed."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class A2aError(FedhlmError):
    """A request over A2A cannot be served. `code` is JSON-RPC's, and `request` the id of the request if it is known."""

    def __init__(self, code: int, message: str, *, request: str | int | None = None) -> None:
        self.code = code
        self.request = request
        super().__init__(message)


class ReceiptError(FedhlmError):
    """A receipt cannot be checked, is about another text, or has a wrong signature."""


class TraceError(FedhlmError):
    """A recording cannot be read, written or used as asked."""
