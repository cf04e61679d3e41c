"""The exception tree. What a caller can act on is a FedhlmError; anything else that escapes is a bug.

FedhlmError
├── ConfigError        a key, its value and what was expected
├── DataMissing        training or benchmark data is not there
├── ModelError         a model folder is missing, incomplete or of the wrong kind
├── FingerprintMismatch  agent and cloud do not run the same tokenizer, vocabulary or sampler
├── ProtocolError      bytes on a topic are not a message of that topic
├── BusError           the broker cannot be reached or refuses
└── TraceError         a recording cannot be read, written or used as asked
"""


class FedhlmError(Exception):
    """Base of every error that a caller is expected to handle."""


class ConfigError(FedhlmError):
    """A configuration key has a value that cannot be used."""

    def __init__(self, key: str, value: object, expectation: str) -> None:
        super().__init__(f"{key} is {value!r}: {expectation}")
        self.key = key
        self.value = value
        self.expectation = expectation


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


def root_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: what a person wants to read of a task group that failed."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class TraceError(FedhlmError):
    """A recording cannot be read, written or used as asked."""
