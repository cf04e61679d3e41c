"""The parameters of each request, as tables: its type, and whether it is used, has no effect, or must be off.

One rule holds for every request. A parameter is used as documented, or has no effect on the text and is listed as such,
or is rejected unless its value switches nothing on. A parameter that is not in the table is rejected. `null` is the
same as leaving a parameter out.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec

from fedhlm_doors.refusals import ApiError, unsupported

Use = Literal["used", "no effect", "must be off"]
_SHOWN: Final = 64  # characters of a value that an error shows


class Parameter(NamedTuple):
    """A parameter: its type for msgspec, how it is used, a description, and the values that switch nothing on."""

    type: Any
    use: Use
    about: str
    off: tuple[Any, ...] = ()
    required: bool = False


Table = dict[str, Parameter]


def used(kind: Any, about: str, *, required: bool = False) -> Parameter:
    """Make a parameter that is used."""
    return Parameter(kind, "used", about, required=required)


def idle(kind: Any, about: str) -> Parameter:
    """Make a parameter that has no effect on the text."""
    return Parameter(kind, "no effect", about)


def must_be_off(about: str, *off: Any) -> Parameter:
    """Make a parameter that is rejected unless its value is one of `off`."""
    return Parameter(Any, "must be off", about, off)


def read(body: bytes, table: Table) -> dict[str, Any]:
    """Decode the JSON object of a request. Parameters without effect, and null, are left out of the result.

    Raises:
        ApiError: the body is no JSON object, or breaks the rule for parameters.
    """
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ApiError(f"the body must be JSON (got {exc})", code="invalid_json") from exc
    if not isinstance(given, dict):
        raise ApiError(f"the body must be a JSON object (got {_shown(given)})", code="invalid_json")
    return checked(given, table)


def checked(given: Mapping[str, Any], table: Table, prefix: str = "") -> dict[str, Any]:
    """Check an object's parameters. `prefix` comes before their names in errors; see `read`."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        full = prefix + name
        parameter = table.get(name)
        if parameter is None:
            raise ApiError(f"{full[:_SHOWN]} is not a known parameter", param=full[:_SHOWN], code="unknown_parameter")
        if value is None:
            continue
        if parameter.use == "must be off":
            if not any(_same(value, off) for off in parameter.off):
                raise unsupported(full, parameter.about)
            continue
        checked_value = convert(value, parameter.type, full)
        if parameter.use == "used":
            found[name] = checked_value
    for name, parameter in table.items():
        if parameter.required and name not in found:
            raise ApiError(f"{prefix}{name} must be given", param=prefix + name, code="missing_required_parameter")
    return found


def convert(value: Any, kind: Any, param: str) -> Any:
    """Convert a JSON value to a type.

    Raises:
        ApiError: the value has another type, is out of range, or is no valid Unicode text.
    """
    try:
        converted = msgspec.convert(value, kind)
        str(converted).encode()
    except (msgspec.ValidationError, UnicodeEncodeError) as exc:
        raise ApiError(
            f"{param} cannot be used: {exc} (got {_shown(value)})", param=param, code="invalid_value"
        ) from exc
    return converted


def _same(value: object, other: object) -> bool:
    """Whether two JSON values are equal: in JSON true is not 1, and false is not 0."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _shown(value: object) -> str:
    text = repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
