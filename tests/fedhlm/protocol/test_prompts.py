"""The errors of prompts that cannot be decoded name the request wherever its name can be read."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Prompt
from fedhlm.protocol.prompts import leading_scalars, unusable

PROMPT = Prompt(
    version=3, sender="ann", sequence=7, sent_ms=1_800_000_000_000, request="lost", text="Oil" * 40, max_tokens=5
)
WHOLE = encode(PROMPT)
HEAD = WHOLE.index(b"lost") + len(b"lost")
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=70_000)


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_a_prompt_that_is_cut_off_is_named_from_the_end_of_its_name_on(length: int) -> None:
    found = unusable(WHOLE[:length])
    if length < HEAD:
        assert found is None
    else:
        assert found is not None
        assert (found.request, found.client) == ("lost", "ann")
        assert "one whole msgpack array" in found.reason


@pytest.mark.parametrize("more", [b"\xc0", b"\0", WHOLE], ids=["nil", "NUL", "twice"])
def test_a_prompt_with_something_behind_it_is_named(more: bytes) -> None:
    found = unusable(WHOLE + more)
    assert found is not None
    assert found.request == "lost"


@given(st.lists(scalars, max_size=20), st.integers(0, 20), st.sampled_from([b"", b"\xc1", b"\x91", b"\xdf"]))
def test_scalars_are_read_as_msgpack_has_them(values: list[Any], count: int, behind: bytes) -> None:
    raw = leading_scalars(msgspec.msgpack.encode(values) + behind, count)
    assert repr([msgspec.msgpack.decode(value) for value in raw]) == repr(values[:count])


@given(st.binary(max_size=40))
def test_any_bytes_can_be_asked(payload: bytes) -> None:
    unusable(payload)
    unusable(b"\x91\x02" + payload)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_tokens", 0, "must be an integer from 1 to 65536 (got 0)"),
        ("temperature", float("nan"), "(got nan)"),
        ("preset", "../x", "(got '../x')"),
        ("text", None, "(got None)"),
        ("stop", ["x"] * 40, "'x'..."),
    ],
)
def test_the_error_shows_what_came(field: str, value: Any, said: str) -> None:
    fields = [2, *(getattr(PROMPT, name) for name in PROMPT.__struct_fields__)]
    fields[1 + PROMPT.__struct_fields__.index(field)] = value
    found = unusable(msgspec.msgpack.encode(fields))
    assert found is not None
    assert said in found.reason or f"{said})" in found.reason
