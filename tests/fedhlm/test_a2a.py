"""A2A: what is read from requests, and that everything that is written is what the A2A SDK's types say."""

import json
from typing import Any, Final

import pytest
from a2a.client.card_resolver import parse_agent_card
from a2a.compat.v0_3 import types as former
from a2a.types import a2a_pb2 as current
from google.protobuf.json_format import Parse, ParseDict
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.a2a import (
    CURRENT,
    FORMER,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    METHODS,
    PARSE_ERROR,
    RESPONDER_UNAVAILABLE,
    TRANSPORT_ERROR,
    Dialect,
    State,
    TaskShape,
    TaskState,
    card_of,
    client_of,
    error_of,
    read_call,
)
from fedhlm.errors import A2aError

TASK: Final = "3f0b6c1e-9a7d-4b5c-8e2f-0123456789ab"
STATES: Final[tuple[State, ...]] = ("submitted", "working", "completed", "failed", "canceled", "rejected")


def sent(**more: Any) -> dict[str, Any]:
    message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "Oil prices"}], "taskId": TASK}
    return {"jsonrpc": "2.0", "id": 7, "method": "SendMessage", "params": {"message": message | more}}


def refused(payload: bytes) -> A2aError:
    with pytest.raises(A2aError) as caught:
        read_call(payload)
    return caught.value


@pytest.mark.parametrize("method", METHODS)
def test_requests_of_both_versions_are_read(method: str) -> None:
    wanted, dialect = METHODS[method]
    if wanted in ("send", "stream"):
        role, kind = ("user", {"kind": "text"}) if dialect is FORMER else ("ROLE_USER", {})
        params: dict[str, Any] = sent(role=role, parts=[{"text": "Oil", **kind}, {"text": "prices", **kind}])["params"]
        params["metadata"] = {"fedhlm": {"max_tokens": 5}, "other": 1}
    else:
        params = {"id": TASK}
    call = read_call(json.dumps({"jsonrpc": "2.0", "id": "x", "method": method, "params": params}).encode())
    assert (call.request, call.method, call.dialect, call.task) == ("x", wanted, dialect, TASK)
    if wanted in ("send", "stream"):
        assert call.text == "Oil\nprices"
        assert call.options == {"max_tokens": 5}


@pytest.mark.parametrize(
    ("payload", "code", "request_id", "told"),
    [
        (b"", PARSE_ERROR, None, "must be JSON"),
        (b"caf\xc3", PARSE_ERROR, None, "must be JSON"),
        (b"[" * 100_000, PARSE_ERROR, None, "must be JSON"),
        (b'{"id": "\\ud800"}', PARSE_ERROR, None, "must be JSON"),
        (b"[]", INVALID_REQUEST, None, "one JSON object"),
        (b'{"jsonrpc": "2.0", "method": "GetTask"}', INVALID_REQUEST, None, "id must be"),
        (b'{"jsonrpc": "2.0", "id": true}', INVALID_REQUEST, None, "id must be"),
        (b'{"jsonrpc": "2.0", "id": 1.5}', INVALID_REQUEST, None, "id must be"),
        (json.dumps({"id": "x" * 129}).encode(), INVALID_REQUEST, None, "id must be"),
        (b'{"jsonrpc": "1.0", "id": 1, "method": "GetTask"}', INVALID_REQUEST, 1, "jsonrpc must be"),
        (b'{"jsonrpc": "2.0", "id": 1}', INVALID_REQUEST, 1, "method must be"),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "ListTasks"}', METHOD_NOT_FOUND, 1, "got 'ListTasks'"),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "GetTask"}', INVALID_PARAMS, 1, "params"),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": {"id": 1}}', INVALID_PARAMS, 1, "$.id"),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {}}', INVALID_PARAMS, 1, "message"),
    ],
)
def test_what_is_no_request_has_the_code_of_json_rpc(
    payload: bytes, code: int, request_id: int | None, told: str
) -> None:
    error = refused(payload)
    assert (error.code, error.request) == (code, request_id)
    assert told in str(error)


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        ({"taskId": None}, TRANSPORT_ERROR, "message.taskId must be a UUID of version 4"),
        ({"taskId": "3f0b6c1e-9a7d-1b5c-8e2f-0123456789ab"}, TRANSPORT_ERROR, "version 4"),
        ({"taskId": 4}, INVALID_PARAMS, "taskId"),
        ({"role": "ROLE_AGENT"}, INVALID_PARAMS, "role"),
        ({"parts": []}, INVALID_PARAMS, "parts"),
        ({"parts": [{"raw": "AAAA"}]}, INVALID_PARAMS, "message.parts must be texts"),
        ({"parts": [{"text": ""}]}, INVALID_PARAMS, "must hold a text"),
        ({"parts": [{"text": "x" * 1_048_577}]}, INVALID_PARAMS, "text must be at most"),
        ({"contextId": "x" * 129}, INVALID_PARAMS, "contextId"),
        ({"messageId": None}, INVALID_PARAMS, "messageId"),
    ],
)
def test_a_message_that_cannot_be_used_is_refused_with_its_reason(more: dict[str, Any], code: int, told: str) -> None:
    error = refused(json.dumps(sent(**more)).encode())
    assert (error.code, error.request) == (code, 7)
    assert told in str(error)


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"seed": "x"}, {"colour": 1}, [], {"temperature": 11}])
def test_options_have_the_limits_of_a_prompt(options: Any) -> None:
    asked = sent()
    asked["params"]["metadata"] = {"fedhlm": options}
    assert refused(json.dumps(asked).encode()).code == INVALID_PARAMS


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.binary(max_size=64) | st.dictionaries(st.sampled_from(["id", "method", "params", "jsonrpc"]), json_values).map(
    lambda found: json.dumps({"jsonrpc": "2.0", "id": 1, "method": "SendMessage"} | found).encode()
))  # fmt: skip
def test_any_bytes_are_a_call_or_an_error_that_can_be_told(payload: bytes) -> None:
    try:
        read_call(payload)
    except A2aError as exc:
        told = json.loads(error_of(exc))
        former.JSONRPCErrorResponse.model_validate(told)


@pytest.mark.parametrize(
    ("topic", "client"),
    [
        ("$a2a/v1/reply/o/home/desk/1", "desk"),
        ("$a2a/v1/reply/o/home/desk/" + "s" * 128, "desk"),
        ("$a2a/v1/reply/o/home/desk/" + "s" * 129, None),
        ("$a2a/v1/reply/o/home/desk", None),
        ("$a2a/v1/reply/o/home/desk/1/2", None),
        ("$a2a/v1/reply/o/barn/desk/1", None),
        ("$a2a/v1/reply/p/home/desk/1", None),
        ("$a2a/v1/request/o/home/porch/1", None),
        ("$a2a/v1/reply/o/home/+/1", None),
        ("$a2a/v1/reply/o/home/desk/#", None),
        ("fedhlm/1/c/home/a/porch/prompt", None),
        ("", None),
    ],
)
def test_only_reply_topics_of_the_cluster_are_somebodys(topic: str, client: str | None) -> None:
    assert client_of(topic, "o", "home") == client


def told(payload: bytes) -> Any:
    found = json.loads(payload)
    assert (found["jsonrpc"], found["id"]) == ("2.0", "r")
    return found["result"]


def shape(dialect: Dialect) -> TaskShape:
    return TaskShape("r", dialect, TASK, "context")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("reason", ["", "because"])
def test_what_is_written_is_what_the_sdk_reads(state: State, reason: str) -> None:
    now = TaskState(state, 1_700_000_000_123, reason, {"finish": "stop"})
    over = state in ("completed", "failed", "canceled", "rejected")

    stream = ParseDict(told(shape(CURRENT).state(now)), current.StreamResponse()).status_update
    assert (stream.task_id, stream.context_id) == (TASK, "context")
    assert current.TaskState.Name(stream.status.state) == f"TASK_STATE_{state.upper()}"
    assert stream.status.timestamp.ToMilliseconds() == now.at_ms
    assert [part.text for part in stream.status.message.parts] == ([reason] if reason else [])
    piece = ParseDict(told(shape(CURRENT).piece("a", first=False, last=True)), current.StreamResponse()).artifact_update
    assert (piece.artifact.parts[0].text, piece.append, piece.last_chunk) == ("a", True, True)
    whole = ParseDict(told(shape(CURRENT).task(now, "text", sent=True)), current.SendMessageResponse()).task
    assert whole == ParseDict(told(shape(CURRENT).task(now, "text", sent=False)), current.Task())
    assert (whole.id, whole.artifacts[0].parts[0].text) == (TASK, "text")

    old = former.TaskStatusUpdateEvent.model_validate(told(shape(FORMER).state(now)))
    assert (old.status.state.value, old.final) == (state, over)
    old_piece = former.TaskArtifactUpdateEvent.model_validate(told(shape(FORMER).piece("a", first=True, last=False)))
    assert (old_piece.append, old_piece.last_chunk) == (False, False)
    answer = json.loads(shape(FORMER).task(now, "", sent=True))
    old_task = former.SendMessageSuccessResponse.model_validate(answer).result
    assert isinstance(old_task, former.Task)
    assert old_task.artifacts is None


@pytest.mark.parametrize("code", [RESPONDER_UNAVAILABLE, TRANSPORT_ERROR, INVALID_PARAMS])
def test_errors_of_the_convention_have_its_words(code: int) -> None:
    error = json.loads(error_of(A2aError(code, "no", request="r")))
    former.JSONRPCErrorResponse.model_validate(error)
    names = {RESPONDER_UNAVAILABLE: "responder_unavailable", TRANSPORT_ERROR: "transport_protocol_error"}
    assert error["error"].get("data") == ({"a2a_error": names[code]} if code in names else None)


def test_the_card_is_one_of_both_versions() -> None:
    card = card_of("porch", "An agent.", "mqtt://broker:1883")
    old = former.AgentCard.model_validate_json(card)
    assert old.url == "mqtt://broker:1883"
    new = parse_agent_card(json.loads(card))
    assert new == Parse(card, current.AgentCard(), ignore_unknown_fields=True)
    assert [interface.protocol_version for interface in new.supported_interfaces] == ["1.0", "0.3"]
    assert new.capabilities.streaming
    assert new.skills[0].tags
