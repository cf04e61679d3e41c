"""What form an answer must have: from the parameters of both APIs to a grammar. No I/O."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

from msgspec import Meta

from fedhlm.decoding.grammar import of_choice, of_regex, of_schema
from fedhlm_doors.parameters import Table, checked, convert, used
from fedhlm_doors.refusals import ApiError

OBJECT: Final = {"type": "object"}
Schema = dict[str, Any]
Choices = Annotated[list[str], Meta(min_length=1, max_length=1_024)]

RESPONSE_FORMAT: Final[Table] = {
    "type": used(str, "text, json_object or json_schema.", required=True),
    "json_schema": used(dict[str, Any], "With json_schema: `name`, `schema`."),
}
JSON_SCHEMA: Final[Table] = {
    "name": used(str, "A name, which has no effect on the answer.", required=True),
    "description": used(str, "A description, which has no effect on the answer."),
    "schema": used(Schema, "The schema that the answer is valid under.", required=True),
    "strict": used(bool, "Schemas are always followed."),
}


class _Form:
    """A key of `structured_outputs`: its type, a description, and how a value becomes a grammar."""

    def __init__(self, kind: Any, about: str, grammar: Callable[[Any], str]) -> None:
        self.parameter = used(kind, about)
        self.grammar = grammar


_FORMS: Final = {
    "json": _Form(Schema, "A JSON schema.", of_schema),
    "regex": _Form(str, "A regular expression of Rust's regex crate, which the whole answer matches.", of_regex),
    "choice": _Form(Choices, "Texts, one of which is the answer.", of_choice),
    "grammar": _Form(str, "A grammar in llguidance's Lark dialect.", str),
}
STRUCTURED: Final[Table] = {name: form.parameter for name, form in _FORMS.items()}


def response_grammar(given: Mapping[str, Any]) -> str | None:
    """The grammar that `response_format` and vLLM's `structured_outputs` ask for; None: any text.

    Raises:
        ApiError: they are wrong, or both are given.
    """
    wanted = [grammar for grammar in (_response_format(given), _structured(given)) if grammar is not None]
    if len(wanted) > 1:
        raise ApiError(
            "structured_outputs must be left out where response_format is given",
            param="structured_outputs",
            code="invalid_value",
        )
    return wanted[0] if wanted else None


def ollama_grammar(value: Any) -> str | None:
    """The grammar that Ollama's `format` asks for: "json", a JSON schema, or nothing ("").

    Raises:
        ApiError: it is something else.
    """
    if value in (None, ""):
        return None
    if value == "json":
        return of_schema(OBJECT)
    if not isinstance(value, dict):
        raise ApiError(f"format must be 'json' or a JSON schema (got {json.dumps(value)[:64]})", param="format")
    return of_schema(value)


def _response_format(given: Mapping[str, Any]) -> str | None:
    if "response_format" not in given:
        return None
    form = checked(given["response_format"], RESPONSE_FORMAT, "response_format.")
    match form["type"]:
        case "text":
            return None
        case "json_object":
            return of_schema(OBJECT)
        case "json_schema" if "json_schema" in form:
            return of_schema(checked(form["json_schema"], JSON_SCHEMA, "response_format.json_schema.")["schema"])
    raise ApiError(
        "response_format must be of the type text, json_object, or json_schema with a json_schema "
        f"(got {form['type'][:64]!r})",
        param="response_format.type",
        code="invalid_value",
    )


def _structured(given: Mapping[str, Any]) -> str | None:
    forms = checked(given.get("structured_outputs", {}), STRUCTURED, "structured_outputs.")
    if len(forms) > 1:
        raise ApiError(
            f"structured_outputs must have one of {', '.join(STRUCTURED)} (got {', '.join(forms)})",
            param="structured_outputs",
            code="invalid_value",
        )
    for name, value in forms.items():
        return _FORMS[name].grammar(convert(value, _FORMS[name].parameter.type, f"structured_outputs.{name}"))
    return None
