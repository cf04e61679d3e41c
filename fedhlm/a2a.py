"""A2A over MQTT without the MQTT: requests of JSON-RPC, tasks, and how both look in JSON.

The topics, the user properties and the error codes from -32005 to -32003 are those of EMQX's convention 0.1
(github.com/emqx/mqtt-for-ai), which builds on A2A 1.0. Requests with the method names of A2A 0.3 are answered in the
shapes of 0.3.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeGuard

import msgspec
from msgspec import Meta

from fedhlm.bus.interface import Extras
from fedhlm.errors import A2aError, ConfigError
from fedhlm.protocol.fields import NAME_PATTERN
from fedhlm.protocol.open_topics import A2A_REPLY, as_json
from fedhlm.protocol.prompts import check
from fedhlm.receipts import Receipt
from fedhlm.version import __version__

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
TASK_NOT_FOUND: Final = -32001
TASK_NOT_CANCELABLE: Final = -32002
RESPONDER_UNAVAILABLE: Final = -32004
TRANSPORT_ERROR: Final = -32005
_BINDING: Final = {RESPONDER_UNAVAILABLE: "responder_unavailable", TRANSPORT_ERROR: "transport_protocol_error"}

CORRELATION_MAX: Final = 256  # bytes that come back with every message of an answer
SUFFIX_MAX: Final = 128
_UUID4: Final = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-4[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}")
_NAME: Final = re.compile(NAME_PATTERN)
_SUFFIX: Final = re.compile(rf"[A-Za-z0-9_.-]{{1,{SUFFIX_MAX}}}")
_ID: Final = "a text of at most 128 characters or an integer"
OPTIONS: Final = ("max_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "preset")
"""What `metadata.fedhlm` of a request may hold, in the words of a prompt."""

State = Literal["submitted", "working", "completed", "failed", "canceled", "rejected"]
OVER: Final = frozenset[State]({"completed", "failed", "canceled", "rejected"})
ONLINE: Final = Extras(user=(("a2a-status", "online"), ("a2a-status-source", "agent")))
OFFLINE: Final = Extras(user=(("a2a-status", "offline"), ("a2a-status-source", "agent")))
LOST: Final = Extras(user=(("a2a-status", "offline"), ("a2a-status-source", "lwt")))
"""What an edge says of an agent whose last will has come."""

Id = Annotated[str, Meta(max_length=128)]
Method = Literal["send", "stream", "get", "cancel"]


class Dialect(NamedTuple):
    """A version of A2A. `marked`: an object has its kind in a field `kind`, and states and roles are plain words."""

    version: str
    marked: bool


CURRENT: Final = Dialect("1.0", marked=False)
FORMER: Final = Dialect("0.3", marked=True)
METHODS: Final[dict[str, tuple[Method, Dialect]]] = {
    "SendMessage": ("send", CURRENT),
    "SendStreamingMessage": ("stream", CURRENT),
    "GetTask": ("get", CURRENT),
    "CancelTask": ("cancel", CURRENT),
    "message/send": ("send", FORMER),
    "message/stream": ("stream", FORMER),
    "tasks/get": ("get", FORMER),
    "tasks/cancel": ("cancel", FORMER),
}


class Camel(msgspec.Struct, frozen=True, rename="camel"):
    """An object whose fields are written in camel case. Fields that are not known are passed over."""


class MessagePart(Camel, frozen=True):
    """A part of a message. A part without text is of another kind."""

    text: str | None = None


class AskedMessage(Camel, frozen=True):
    """A message from a user. A2A 0.3 and 1.0 have other words for the role."""

    message_id: Id
    role: Literal["user", "ROLE_USER"]
    parts: Annotated[tuple[MessagePart, ...], Meta(min_length=1, max_length=1_024)]
    task_id: Id | None = None
    context_id: Id | None = None


class AskedConfiguration(Camel, frozen=True):
    """Whether the answer comes at once, before the task is over: in the words of 1.0, and of 0.3."""

    return_immediately: bool = False
    blocking: bool = True


class SendParams(Camel, frozen=True):
    """The parameters of a message to an agent."""

    message: AskedMessage
    configuration: AskedConfiguration = AskedConfiguration()
    metadata: dict[str, Any] = {}


class TaskParams(Camel, frozen=True):
    """The parameters of a method about a task."""

    id: Id


class A2aCall(NamedTuple):
    """A valid request. A task's `text`, `context` and `options` are empty where the method is about an earlier one."""

    request: str | int
    method: Method
    dialect: Dialect
    task: str
    text: str = ""
    context: str = ""
    options: Mapping[str, Any] = {}
    at_once: bool = False


def client_of(topic: str, org: str, cluster: str) -> str | None:
    """The client whose reply topic this is; None for any other topic, on which an agent must not answer."""
    levels, wanted = topic.split("/"), A2A_REPLY.pattern.format(org=org, cluster=cluster, client="", suffix="")
    *prefix, client, suffix = levels if len(levels) > 2 else ("", "", "")
    if [*prefix, "", ""] != wanted.split("/"):
        return None
    return client if _NAME.fullmatch(client) and _SUFFIX.fullmatch(suffix) else None


def read_call(payload: bytes) -> A2aCall:
    """Read a request.

    Raises:
        A2aError: it is no valid one.
    """
    try:
        found = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise A2aError(PARSE_ERROR, f"the request must be JSON ({exc})") from None
    if not isinstance(found, dict):
        raise A2aError(INVALID_REQUEST, "the request must be one JSON object")
    request, method = found.get("id"), found.get("method")
    if not _is_id(request):
        raise A2aError(INVALID_REQUEST, f"id must be {_ID}")
    if found.get("jsonrpc") != "2.0":
        raise A2aError(INVALID_REQUEST, 'jsonrpc must be "2.0"', request=request)
    if not isinstance(method, str):
        raise A2aError(INVALID_REQUEST, "method must be a text", request=request)
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise A2aError(METHOD_NOT_FOUND, f"method must be one of {known} (got {method[:64]!r})", request=request)
    try:
        return _call(request, *METHODS[method], found.get("params"))
    except msgspec.ValidationError as exc:
        raise A2aError(INVALID_PARAMS, f"params: {exc}", request=request) from None
    except ConfigError as exc:
        raise A2aError(INVALID_PARAMS, str(exc), request=request) from None
    except A2aError as exc:
        raise A2aError(exc.code, str(exc), request=request) from None


def _is_id(value: object) -> TypeGuard[str | int]:
    if isinstance(value, str):
        return len(value) <= 128
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _call(request: str | int, method: Method, dialect: Dialect, params: object) -> A2aCall:
    if method in ("get", "cancel"):
        return A2aCall(request, method, dialect, msgspec.convert(params, TaskParams).id)
    asked = msgspec.convert(params, SendParams)
    message, configuration = asked.message, asked.configuration
    task = message.task_id or ""
    if not _UUID4.fullmatch(task):
        raise A2aError(
            TRANSPORT_ERROR, f"message.taskId must be a UUID of version 4 that the client makes (got {task!r})"
        )
    texts = [part.text for part in message.parts if part.text is not None]
    if len(texts) != len(message.parts):
        raise A2aError(INVALID_PARAMS, "message.parts must be texts")
    text = "\n".join(texts)
    check("text", text)
    if not text:
        raise A2aError(INVALID_PARAMS, "message.parts must hold a text to continue")
    options = asked.metadata.get("fedhlm", {})
    if not isinstance(options, dict) or not options.keys() <= set(OPTIONS):
        raise A2aError(INVALID_PARAMS, f"metadata.fedhlm must be an object with some of {', '.join(OPTIONS)}")
    for key, value in options.items():
        check(key, value)
    at_once = configuration.return_immediately or not configuration.blocking
    return A2aCall(request, method, dialect, task, text, message.context_id or "", options, at_once)


class TaskState(NamedTuple):
    """How a task stands, `at_ms` in Unix milliseconds. `reason` is for people; `about` becomes `metadata.fedhlm`."""

    state: State
    at_ms: int
    reason: str = ""
    about: Mapping[str, Any] = {}


def about_of(finish: str, statistics: Mapping[str, float], receipt: Receipt | None) -> dict[str, Any]:
    """What a finished task tells of its text: why it ended, its figures, and its receipt if it has one."""
    told: dict[str, Any] = {"finish": finish, "metrics": dict(statistics)}
    return told if receipt is None else told | {"receipt": msgspec.to_builtins(receipt)}


class TaskShape:
    """Writes what is said of one task, in one dialect, as the answers to one request."""

    def __init__(self, request: str | int, dialect: Dialect, task: str, context: str) -> None:
        self._request = request
        self._dialect = dialect
        self._task = task
        self._context = context

    def state(self, now: TaskState) -> bytes:
        """An update of the state, as an answer of a stream."""
        event = {**self._ids(), "status": self._status(now), **_about(now)}
        if self._dialect.marked:
            return answer(self._request, {"kind": "status-update", "final": now.state in OVER, **event})
        return answer(self._request, {"statusUpdate": event})

    def piece(self, text: str, *, first: bool, last: bool) -> bytes:
        """An update of the text, as an answer of a stream."""
        event = {**self._ids(), "artifact": self._artifact(text), "append": not first, "lastChunk": last}
        if self._dialect.marked:
            return answer(self._request, {"kind": "artifact-update", **event})
        return answer(self._request, {"artifactUpdate": event})

    def task(self, now: TaskState, text: str, *, sent: bool) -> bytes:
        """The whole task, as the answer to a message (`sent`) or to a question about the task."""
        whole: dict[str, Any] = {"id": self._task, "contextId": self._context, "status": self._status(now)}
        if text:
            whole["artifacts"] = [self._artifact(text)]
        whole |= _about(now)
        if self._dialect.marked:
            return answer(self._request, {"kind": "task", **whole})
        return answer(self._request, {"task": whole} if sent else whole)

    def _ids(self) -> dict[str, str]:
        return {"taskId": self._task, "contextId": self._context}

    def _part(self, text: str) -> dict[str, str]:
        return {"kind": "text", "text": text} if self._dialect.marked else {"text": text}

    def _artifact(self, text: str) -> dict[str, Any]:
        return {"artifactId": "text", "parts": [self._part(text)]}

    def _status(self, now: TaskState) -> dict[str, Any]:
        marked = self._dialect.marked
        moment = datetime.fromtimestamp(now.at_ms / 1000.0, UTC).isoformat(timespec="milliseconds")
        status: dict[str, Any] = {
            "state": now.state if marked else f"TASK_STATE_{now.state.upper()}",
            "timestamp": moment.replace("+00:00", "Z"),
        }
        if now.reason:
            status["message"] = {
                **({"kind": "message"} if marked else {}),
                "messageId": f"{self._task}-{now.state}",
                "role": "agent" if marked else "ROLE_AGENT",
                "parts": [self._part(now.reason)],
                **self._ids(),
            }
        return status


def _about(now: TaskState) -> dict[str, Any]:
    return {"metadata": {"fedhlm": now.about}} if now.about else {}


def answer(request: str | int, result: Mapping[str, Any]) -> bytes:
    """An answer of JSON-RPC."""
    return as_json({"jsonrpc": "2.0", "id": request, "result": result})


def error_of(error: A2aError) -> bytes:
    """The answer of JSON-RPC that tells an error."""
    told: dict[str, Any] = {"code": error.code, "message": str(error)}
    if error.code in _BINDING:
        told["data"] = {"a2a_error": _BINDING[error.code]}
    return as_json({"jsonrpc": "2.0", "id": error.request, "error": told})


def card_of(name: str, about: str, url: str) -> bytes:
    """The card of an agent. `url` is the address of its broker; clients have it already, since they read the card there.

    The fields from `url` on are those of A2A 0.3.
    """
    transport = "MQTTv5+JSONRPCv2"
    skill = {
        "id": "continue",
        "name": "Continue a text",
        "description": "Continues a text with a small model, whose tokens a large one verifies.",
        "tags": ["text"],
    }
    return as_json(
        {
            "name": name,
            "description": about,
            "version": __version__,
            "supportedInterfaces": [
                {"url": url, "protocolBinding": transport, "protocolVersion": dialect.version}
                for dialect in (CURRENT, FORMER)
            ],
            "capabilities": {"streaming": True, "pushNotifications": False},
            "defaultInputModes": ["text/plain"],
            "defaultOutputModes": ["text/plain"],
            "skills": [skill],
            "url": url,
            "preferredTransport": transport,
            "protocolVersion": "0.3.0",
        }
    )
