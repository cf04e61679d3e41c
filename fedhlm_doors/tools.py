"""Tools: from a request's functions to a grammar for calls of them, and from the text of an answer to its calls. No I/O.

Calls are written as models of the Hermes and Qwen families write them: a JSON object with `name` and `arguments`
between OPEN and CLOSE.
"""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from fedhlm.answering import Slice, ToolCall
from fedhlm.decoding.grammar import json_rule
from fedhlm_doors.parameters import Table, checked, idle, used
from fedhlm_doors.refusals import ApiError

OPEN: Final = "<tool_call>\n"
CLOSE: Final = "\n</tool_call>"
NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS_MAX: Final = 128
_ONE_RULE: Final = "start: "
FunctionName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+\Z")]
Tools = Annotated[list[dict[str, Any]], Meta(max_length=TOOLS_MAX)]

TOOL: Final[Table] = {
    "type": used(str, "function.", required=True),
    "function": used(dict[str, Any], "The function.", required=True),
}
FUNCTION: Final[Table] = {
    "name": used(FunctionName, "1 to 64 letters, digits, '_', '-' or '.'.", required=True),
    "description": used(str, "What the function does, for the chat template."),
    "parameters": used(dict[str, Any], "The JSON schema of the arguments. Default: an object without properties."),
    "strict": idle(bool, "Schemas are always followed."),
}
CALL: Final[Table] = {
    "id": used(str, "The call's name."),
    "index": idle(int, "Calls are in order."),
    "type": used(str, "function."),
    "function": used(dict[str, Any], "`name` and `arguments`.", required=True),
}
CALLED: Final[Table] = {
    "index": idle(int, "Calls are in order."),
    "name": used(FunctionName, "The function.", required=True),
    "arguments": used(str | dict[str, Any], "The arguments, as JSON."),
    "description": idle(str, "What some clients send back."),
}


class Wanted(NamedTuple):
    """The tools of a request. `for_template` is what the chat template is given. Without a `grammar` none is called."""

    for_template: list[dict[str, Any]]
    grammar: str | None


def wanted(
    tools: Sequence[Mapping[str, Any]], choice: Any = None, *, parallel: bool = True, otherwise: str | None = None
) -> Wanted:
    """Read the tools of a request and which of them must be called (`tool_choice`).

    `otherwise` is the grammar of answers without a call (None: any text).

    Raises:
        ApiError: a tool is wrong, or the choice names none of them.
    """
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise ApiError("tools must have different names", param="tools", code="invalid_value")
    must, chosen = _chosen(choice, names)
    for_template = [{"type": "function", "function": function} for function in functions]
    if choice == "none" or not functions:
        return Wanted(for_template if choice != "none" else [], otherwise)
    calls = [f for f in functions if chosen in (None, f["name"])]
    return Wanted(for_template, _grammar(calls, must=must, several=parallel and chosen is None, otherwise=otherwise))


def _chosen(choice: Any, names: Sequence[str]) -> tuple[bool, str | None]:
    """Whether a tool must be called, and which one (None: any)."""
    if choice in (None, "none", "auto") or (choice == "required" and names):
        return choice == "required", None
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None or name not in names:
        raise ApiError(
            f"tool_choice must be none, auto, required with tools, or one of the tools (got {json.dumps(choice)[:64]})",
            param="tool_choice",
            code="invalid_value",
        )
    return True, name


def _function(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    found = checked(tool, TOOL, f"{param}.")
    if found["type"] != "function":
        raise ApiError(f"{param}.type must be function (got {found['type'][:64]!r})", param=f"{param}.type")
    return checked(found["function"], FUNCTION, f"{param}.function.")


def _grammar(functions: Sequence[Mapping[str, Any]], *, must: bool, several: bool, otherwise: str | None) -> str:
    """The grammar of an answer. Free text may come before and after calls, unless one of them must be made."""
    call = json_rule(
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or NO_ARGUMENTS},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for f in functions
            ]
        }
    )
    opened, closed = json.dumps(OPEN), json.dumps(CLOSE)
    only_calls = f'{opened} called ("\\n" {opened} called)*' if several else f"{opened} called"
    rules = [f"called: {call} {closed}"]
    if must:
        return "\n".join([f"start: {only_calls}", *rules])
    if otherwise is not None:
        if not otherwise.startswith(_ONE_RULE) or "\n" in otherwise:
            raise ApiError("tools cannot be given with a grammar of several rules", param="tools", code="invalid_value")
        return "\n".join([f"start: {only_calls} | {otherwise.removeprefix(_ONE_RULE)}", *rules])
    rules += [f"open[lazy]: TEXT {opened}", r"TEXT: /(.|\n)*/"]
    return "\n".join([f"start: {'(open called)* TEXT' if several else 'open called | TEXT'}", *rules])


class _CallObject(msgspec.Struct):
    """A call as a model writes it."""

    name: str
    arguments: dict[str, Any]


class CallReader:
    """Takes calls out of a text that comes in pieces. What may still become a call is held back.

    What only looks like a call stays text.
    """

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCall]]:
        """Add text. Return what can be shown of it, and the calls that are complete. With `last` nothing is held back."""
        self._held += text
        shown, calls = "", []
        while (at := self._held.find(OPEN)) >= 0:
            end = self._held.find(CLOSE, at)
            if end < 0:
                break
            call = _call(self._held[at + len(OPEN) : end])
            if call is None:
                shown, self._held = shown + self._held[: at + len(OPEN)], self._held[at + len(OPEN) :]
                continue
            shown += self._held[:at].rstrip("\n")
            calls.append(call)
            self._held = self._held[end + len(CLOSE) :].removeprefix("\n")
        keep = len(self._held) - at if at >= 0 else _overlap(self._held)
        cut = len(self._held) if last else len(self._held) - keep
        shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown, calls


async def with_calls(answer: AsyncGenerator[Slice, None]) -> AsyncGenerator[Slice, None]:
    """Yield the slices of an answer with the calls taken out of the text. Closing it closes the answer."""
    reader = CallReader()
    async with aclosing(answer):
        async for piece in answer:
            shown, calls = reader.push(piece.text, last=piece.finish is not None)
            yield piece._replace(text=shown, calls=tuple(calls))


def _overlap(text: str) -> int:
    """The length of the longest beginning of OPEN at the end of a text."""
    return next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)


def _call(text: str) -> ToolCall | None:
    """The call that a text between OPEN and CLOSE is; None if it is none, as in a text that no grammar held."""
    try:
        found = msgspec.json.decode(text, type=_CallObject)
    except (msgspec.DecodeError, RecursionError):
        return None
    return ToolCall(found.name, json.dumps(found.arguments, ensure_ascii=False))


def earlier_calls(calls: Sequence[Mapping[str, Any]], param: str) -> list[dict[str, Any]]:
    """Check the calls of an earlier answer, as chat templates want them: with the arguments as an object.

    Raises:
        ApiError: a call is wrong.
    """
    found = []
    for i, given in enumerate(calls):
        name = f"{param}[{i}]"
        call = checked(given, CALL, f"{name}.")
        function = checked(call["function"], CALLED, f"{name}.function.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments or "{}")
            except (msgspec.DecodeError, RecursionError) as exc:
                raise ApiError(
                    f"{name}.function.arguments must be a JSON object (got {exc})",
                    param=f"{name}.function.arguments",
                    code="invalid_value",
                ) from exc
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found
