"""The OpenAPI document of the APIs, generated from the tables of parameters."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from fedhlm.answering import Offer
from fedhlm.version import __version__
from fedhlm_doors import formats, ollama, openai, tools
from fedhlm_doors.parameters import Parameter, Table
from fedhlm_doors.questions import models

REQUESTS: Final[dict[str, Table]] = {
    "/v1/completions": openai.COMPLETION,
    "/v1/chat/completions": openai.CHAT,
    "/api/generate": ollama.GENERATE,
    "/api/chat": ollama.CHAT,
    "/api/show": ollama.NAMED,
    "/api/pull": ollama.NAMED,
}
READS: Final = ("/", "/v1/models", "/api/version", "/api/tags", "/api/ps")
_INNER: Final[Mapping[str, Mapping[str, Table]]] = {
    "/v1/completions": {"stream_options": openai.STREAM_OPTIONS, "structured_outputs": formats.STRUCTURED},
    "/v1/chat/completions": {
        "stream_options": openai.STREAM_OPTIONS,
        "structured_outputs": formats.STRUCTURED,
        "response_format": formats.RESPONSE_FORMAT,
        "messages": openai.MESSAGE,
        "tools": tools.TOOL,
    },
    "/api/generate": {"options": ollama.OPTIONS},
    "/api/chat": {"options": ollama.OPTIONS, "messages": ollama.MESSAGE, "tools": tools.TOOL},
}
_ERRORS: Final = ("400", "401", "403", "404", "408", "413", "429", "500")


def document(offer: Offer) -> dict[str, Any]:
    """The document as JSON values. `offer` names the models."""
    paths: dict[str, Any] = {path: {"get": {"responses": _responses(path)}} for path in READS}
    paths["/v1/models/{name}"] = {
        "get": {
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
            "responses": _responses("/v1/models/{name}"),
        }
    }
    for path, table in REQUESTS.items():
        schema = _object(table, _INNER.get(path, {}))
        schema["properties"]["model"] = {"enum": models(offer), "description": "A model of this server."}
        paths[path] = {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": _responses(path),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{offer.name} over HTTP", "version": __version__},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
        "paths": paths,
    }


def _object(table: Table, inner: Mapping[str, Table]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            name: _schema(parameter, inner[name]) if name in inner else _of(parameter)
            for name, parameter in table.items()
        },
        "required": [name for name, parameter in table.items() if parameter.required],
        "additionalProperties": False,
    }


def _schema(parameter: Parameter, table: Table) -> dict[str, Any]:
    outer = _of(parameter)
    if "array" in outer["type"]:
        return outer | {"items": _object(table, {})}
    return _object(table, {}) | outer


def _of(parameter: Parameter) -> dict[str, Any]:
    about = {"description": parameter.about}
    if parameter.use == "must be off":
        return {"enum": [None, *parameter.off], "description": f"must be off: {parameter.about}"}
    (schema,), components = msgspec.json.schema_components([parameter.type])
    if components:
        raise AssertionError(f"a parameter's type must need no components (got {sorted(components)})")
    if parameter.required:
        return schema | about
    if isinstance(schema.get("type"), str):
        return schema | about | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]} | about


def _responses(path: str) -> dict[str, Any]:
    error = {"error": {"type": "string"} if path.startswith("/api/") else {"type": "object"}}
    body = {"schema": {"type": "object", "properties": error, "required": ["error"]}}
    found: dict[str, Any] = {code: {"description": "error", "content": {"application/json": body}} for code in _ERRORS}
    kinds = {"text/plain"} if path == "/" else {"application/json"}
    if path.startswith("/v1/") and "completions" in path:
        kinds.add("text/event-stream")
    if path in ("/api/generate", "/api/chat", "/api/pull"):
        kinds.add("application/x-ndjson")
    found["200"] = {"description": "done", "content": {kind: {} for kind in sorted(kinds)}}
    return found
