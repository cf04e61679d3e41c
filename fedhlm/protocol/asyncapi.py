"""The topics and messages as an AsyncAPI 3 document, from the point of view of a client.

A payload is described as the JSON Schema of its msgpack array. msgpack's `bin` is the schema `bin`: a string with
`format: binary`, because JSON Schema has no bytes.
"""

import re
from typing import Any, Final

import msgspec
from msgspec import inspect

from fedhlm.protocol import messages, topics
from fedhlm.protocol.meanings import MEANINGS
from fedhlm.protocol.roles import traits_of
from fedhlm.version import __version__

ASYNCAPI: Final = "3.0.0"
CONTENT_TYPE: Final = "application/x-msgpack"
_DRAFT: Final = "application/schema+json;version=draft-07"
_SCHEMAS: Final = "#/components/schemas/"
_LEVEL: Final = {
    "cluster": "name of a cluster",
    "agent": "name of an agent",
    "client": "name of a client: the `sender` of its prompts, and of its certificate where the broker has access rules",
}


def summary(struct: type[msgspec.Struct]) -> str:
    """Return the first paragraph of a struct's docstring in one line, in msgpack's words."""
    return " ".join((struct.__doc__ or "").partition("\n\n")[0].split()).replace("None", "nil")


def meaning(struct: type[msgspec.Struct], field: str) -> tuple[str, str]:
    """Return the unit and the meaning of a field.

    Raises:
        LookupError: fedhlm/protocol/meanings.py does not say it.
    """
    header = field in messages.Message.__struct_fields__ and issubclass(struct, messages.Message)
    name = "Message" if header else struct.__name__
    try:
        return MEANINGS[name][field]
    except KeyError as exc:
        raise LookupError(f"fedhlm/protocol/meanings.py must say what {field} of {name} means") from exc


def document() -> dict[str, Any]:
    """Return the document, ready for JSON. Channels are the topics; operations are what a client may do with them."""
    return {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "fedhlm",
            "version": __version__,
            "description": (
                f"Schema version {messages.SCHEMA_VERSION}. Payloads are msgpack arrays: the tag, the header, the fields "
                "in order. docs/protocol.md says in words what they mean. Operations are those of a client."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": CONTENT_TYPE,
        "channels": {_id(topic): _channel(topic) for topic in topics.TABLE},
        "operations": {
            f"{action}.{_id(topic)}": _operation(topic, action)
            for topic in topics.TABLE
            for action, roles in (("send", topic.publishers), ("receive", topic.subscribers))
            if any(role.asks for role in traits_of(roles))
        },
        "components": {
            "messages": {topic.payload.__name__: _message(topic.payload) for topic in topics.TABLE},
            "schemas": schemas(),
        },
    }


def schemas() -> dict[str, Any]:
    """Return the JSON Schema (draft 7) of each message and struct by its name."""
    found: dict[str, Any] = {}
    for topic in topics.TABLE:
        _schema(inspect.type_info(topic.payload), found)
    return dict(sorted(found.items()))


def _id(topic: topics.Topic) -> str:
    return re.sub(r"\{(\w+)\}", r"\1", topic.pattern).replace("/", ".")


def _channel(topic: topics.Topic) -> dict[str, Any]:
    levels = re.findall(r"\{(\w+)\}", topic.pattern)
    name = topic.payload.__name__
    return {
        "address": f"{topics.DEFAULT_ROOT}/{topic.pattern}",
        "description": topic.purpose,
        "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        **({"parameters": {level: {"description": _LEVEL.get(level, level)} for level in levels}} if levels else {}),
        "x-publishers": list(topic.publishers),
        "x-subscribers": list(topic.subscribers),
        "x-qos": topic.qos,
        "x-retain": topic.retain,
    }


def _operation(topic: topics.Topic, action: str) -> dict[str, Any]:
    channel = _id(topic).replace("~", "~0").replace("/", "~1")
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": topic.purpose,
        "messages": [{"$ref": f"#/channels/{channel}/messages/{topic.payload.__name__}"}],
        "bindings": {"mqtt": {"qos": topic.qos, "retain": topic.retain}},
    }


def _message(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {
        "name": struct.__name__,
        "summary": summary(struct),
        "contentType": CONTENT_TYPE,
        "payload": {"schemaFormat": _DRAFT, "schema": {"$ref": f"{_SCHEMAS}{struct.__name__}"}},
    }


def _schema(kind: inspect.Type, found: dict[str, Any]) -> dict[str, Any]:  # noqa: C901 - one case per kind of value
    """Return the schema of a type. Structs go to `found`, and a reference to them is returned."""
    match kind:
        case inspect.IntType():
            return {"type": "integer", **_bounds(kind)}
        case inspect.FloatType():
            return {"type": "number", **_bounds(kind)}
        case inspect.StrType():
            pattern = {} if kind.pattern is None else {"pattern": kind.pattern.replace(r"\Z", "$")}
            return {"type": "string", **_length(kind.max_length, "maxLength"), **pattern}
        case inspect.BytesType():
            return {"type": "string", "format": "binary", **_length(kind.max_length, "maxLength")}
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.NoneType():
            return {"type": "null"}
        case inspect.LiteralType():
            return {"enum": list(kind.values)}
        case inspect.VarTupleType():
            items = _schema(kind.item_type, found)
            return {"type": "array", "items": items, **_length(kind.max_length, "maxItems")}
        case inspect.DictType():
            values = _schema(kind.value_type, found)
            return {"type": "object", "additionalProperties": values, **_length(kind.max_length, "maxProperties")}
        case inspect.UnionType():
            return {"anyOf": [_schema(one, found) for one in kind.types]}
        case inspect.StructType():
            name = kind.cls.__name__
            if name not in found:
                found[name] = _array(kind, found)
            return {"$ref": f"{_SCHEMAS}{name}"}
        case _:
            raise TypeError(f"{kind!r} has no JSON Schema here")


def _array(kind: inspect.StructType, found: dict[str, Any]) -> dict[str, Any]:
    name = kind.cls.__name__
    items: list[dict[str, Any]] = [] if kind.tag is None else [{"title": "tag", "const": kind.tag}]
    for field in kind.fields:
        unit, told = meaning(kind.cls, field.name)
        schema = _schema(field.type, found)
        facts = {"title": field.name, "description": told, **({"x-unit": unit} if unit else {})}
        items.append({**facts, "allOf": [schema]} if "$ref" in schema else {**facts, **schema})
    required = len(items) - sum(not field.required for field in kind.fields)
    return {
        "title": name,
        "type": "array",
        "items": items,
        "minItems": required,
        "maxItems": len(items),
        "additionalItems": False,
    }


def _bounds(kind: inspect.IntType | inspect.FloatType) -> dict[str, Any]:
    words = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    return {word: limit for name, word in words.items() if (limit := getattr(kind, name)) is not None}


def _length(most: int | None, word: str) -> dict[str, int]:
    return {} if most is None else {word: most}
