"""The exception tree. What a caller can act on is a FedhlmError; anything else that escapes is a bug.

FedhlmError
├── ConfigError        a key, its value and what it must be
│   └── UnknownKey     a key that does not exist, with the nearest one
├── DataMissing        training or benchmark data is not there
├── ModelError         a model folder is missing, incomplete or of the wrong kind
├── FingerprintMismatch  agent and cloud do not run the same tokenizer, vocabulary or sampler
├── ProtocolError      bytes on a topic are not a message of that topic
├── BusError           the broker cannot be reached or refuses
├── AskError           an answer did not come whole (`fedhlm.Client`)
│   ├── AgentOffline       the agent is not connected to the broker, or has gone
│   ├── DeadlinePassed     the answer, or the next piece of it, did not come in time
│   ├── PiecesLost         a piece is missing and did not come any more
│   ├── RequestCancelled   somebody has ended the request
│   ├── RequestNameTaken   the agent knows the request's name from another prompt
│   └── RequestRefused     the agent says why it does not answer
└── TraceError         a recording cannot be read, written or used as asked
"""


class FedhlmError(Exception):
    """Base of every error that a caller is expected to handle."""


class ConfigError(FedhlmError):
    """A setting or flag has a value that cannot be used: `KEY must be EXPECTED (got VALUE from SOURCE: WHY)`.

    `expectation` completes "must be"; None as the value means that there is none; a secret value is masked by the caller.
    """

    def __init__(self, key: str, value: object, expectation: str, *, why: str = "", source: str = "") -> None:
        self.key = key
        self.value = value
        self.expectation = expectation
        self.why = why
        self.source = source
        super().__init__(self._sentence())

    def _found(self) -> str:
        found = "nothing" if self.value is None else repr(self.value)
        return f"{found}{f' from {self.source}' if self.source else ''}"

    def _sentence(self) -> str:
        return f"{self.key} must be {self.expectation} (got {self._found()}{f': {self.why}' if self.why else ''})"


class UnknownKey(ConfigError):
    """A key does not exist; `expectation` is a hint at what does."""

    def _sentence(self) -> str:
        found = "" if self.value is None else f" (got {self._found()})"
        return f"{self.key} is not a known key: {self.expectation}{found}"


class DataMissing(FedhlmError):
    """Training or benchmark data is absent or malformed."""


class ModelError(FedhlmError):
    """A model folder cannot be used; the message names the file and what was expected."""


class FingerprintMismatch(FedhlmError):
    """Two parties differ in a field that both must share."""

    def __init__(self, field: str, ours: object, theirs: object) -> None:
        super().__init__(f"fingerprint.{field} differs: ours is {ours!r}, theirs is {theirs!r}")
        self.field = field
        self.ours = ours
        self.theirs = theirs


class ProtocolError(FedhlmError):
    """A payload is not a valid message for its topic."""


class BusError(FedhlmError):
    """The broker cannot be reached, refused the connection, or went away."""


class AskError(FedhlmError):
    """An answer of `agent` to `request` did not come whole; `reason` says why."""

    def __init__(self, agent: str, request: str, reason: str) -> None:
        super().__init__(reason)
        self.agent = agent
        self.request = request
        self.reason = reason


class AgentOffline(AskError):
    """The agent is not connected to the broker: it was never there, said goodbye, or its last will was published."""


class DeadlinePassed(AskError):
    """The answer was not whole when its deadline passed, or nothing was heard of it for too long."""


class PiecesLost(AskError):
    """Later pieces came, and the one that begins at token `position` did not."""

    def __init__(self, agent: str, request: str, position: int) -> None:
        super().__init__(agent, request, f"pieces of {agent}'s answer were lost from token {position} on")
        self.position = position


class RequestCancelled(AskError):
    """The request was ended before its text was, by its client or by the agent."""


class RequestNameTaken(AskError):
    """The agent knows the request's name from another prompt; ask again under another one."""


class RequestRefused(AskError):
    """The agent ended the request with an error; `reason` is what it says."""


def root_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: what a person wants to read of a task group that failed."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class TraceError(FedhlmError):
    """A recording cannot be read, written or used as asked."""
