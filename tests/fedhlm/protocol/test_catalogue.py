"""docs/protocol.md and docs/asyncapi.json say what the code does, field by field, and both are generated from it."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given

from edge_agent.result import GenerationResult
from fedhlm.errors import ProtocolError
from fedhlm.learning.certificate import Certificate
from fedhlm.marks import rewritten
from fedhlm.protocol import asyncapi, catalogue, topics
from fedhlm.protocol.catalogue import HEADER, KINDS, field_facts, parts, structs
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.meanings import MEANINGS
from fedhlm.protocol.messages import SCHEMA_VERSION, AnyMessage, Prompt
from tests import npm
from tests.fedhlm.protocol.test_messages import any_message

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "protocol.md"
DOCUMENT = ROOT / "docs" / "asyncapi.json"
COMMAND = "python -m fedhlm.protocol.catalogue docs/protocol.md docs/asyncapi.json"
UNITS = {"_ms": "ms", "_s": "s"}
DESCRIBED: list[type[msgspec.Struct]] = [HEADER, *KINDS, *structs()]


def test_the_page_and_the_document_are_what_the_code_says() -> None:
    page = PAGE.read_text("utf-8")
    assert rewritten(page, parts()) == page, COMMAND
    for name, text in parts().items():
        assert f"<!-- {name} -->\n\n{text}\n\n<!-- end of {name} -->" in page
    assert DOCUMENT.read_text("utf-8") == catalogue.document(), COMMAND


def test_files_that_say_something_else_are_noticed_and_mended(tmp_path: Path) -> None:
    page, document = tmp_path / "page.md", tmp_path / "document.json"
    whole = PAGE.read_text("utf-8")
    page.write_text(whole.replace("| 5 | `request` | str |", "| 6 | `request` | int |"), "utf-8")
    assert page.read_text("utf-8") != whole
    document.write_text("{}", "utf-8")
    assert catalogue.main([str(page), str(document)]) == 0
    assert page.read_text("utf-8") == whole
    assert document.read_text("utf-8") == DOCUMENT.read_text("utf-8")


@pytest.mark.parametrize("struct", DESCRIBED, ids=lambda struct: struct.__name__)
def test_every_field_has_a_meaning_and_the_unit_that_its_name_ends_in(struct: type[msgspec.Struct]) -> None:
    rows = field_facts(struct)
    assert [row.name for row in rows] == list(MEANINGS[struct.__name__])
    for row in rows:
        assert re.fullmatch(r"\S.{5,}[^.\s]", row.meaning), row
        for suffix, unit in UNITS.items():
            assert not row.name.endswith(suffix) or row.unit == unit, row


def test_nothing_else_has_a_meaning() -> None:
    assert MEANINGS.keys() == {struct.__name__ for struct in DESCRIBED}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_place_is_where_the_field_travels(kind: type[AnyMessage]) -> None:
    rows = [*field_facts(HEADER), *field_facts(kind)]
    assert [row.place for row in rows] == list(range(1, len(rows) + 1))
    assert [row.name for row in rows] == list(kind.__struct_fields__)


def test_limits_and_defaults_are_told() -> None:
    rows = {row.name: row for row in field_facts(Prompt)}
    assert (rows["max_tokens"].limits, rows["max_tokens"].default) == ("1 to 65,536", "`64`")
    assert (rows["seed"].type, rows["seed"].limits, rows["seed"].default) == ("int or nil", "0 to 2^63 - 1", "nil")
    assert (rows["request"].limits, rows["request"].default) == ("a name", "required")
    assert rows["top_p"].limits == "above 0, up to 1"


def test_the_figures_of_an_answer_are_named() -> None:
    result = GenerationResult(similarity=0.9, certificate=Certificate(), sources=["local", "cloud"])
    page = PAGE.read_text("utf-8")
    figures = set(result.statistics())
    assert {"tokens_local", "similarity", "risk_limit"} <= figures
    assert not [name for name in figures if f"`{name}`" not in page and not re.match(r"risk_upper_[1-9]", name)]


# The document


def problems(message: Any, payload: bytes) -> list[str]:
    """What the document's schema of a message finds in a payload. JSON has no bytes: they are looked at as characters."""
    document = json.loads(DOCUMENT.read_text("utf-8"))
    schema = {"$ref": f"#/components/schemas/{type(message).__name__}", "components": document["components"]}
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(plain(payload))]


def plain(payload: bytes) -> Any:
    def of(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode("latin-1")
        if isinstance(value, dict):
            return {of(key): of(item) for key, item in value.items()}
        return [of(item) for item in value] if isinstance(value, list) else value

    return of(msgspec.msgpack.decode(payload))


@given(any_message)
def test_the_schema_accepts_every_message(message: AnyMessage) -> None:
    assert problems(message, encode(message)) == []


def test_the_schema_and_the_decoder_reject_the_same() -> None:
    prompt = Prompt(version=SCHEMA_VERSION, sender="me", sequence=1, sent_ms=1, request="a", text="b")
    good = msgspec.msgpack.decode(encode(prompt))
    changed: list[list[Any]] = [good[:6], [*good, 1], [99, *good[1:]]]
    for place, value in (
        (2, "no name"),
        (3, 2**31),
        (4, -1),
        (6, 7),
        (7, 0),
        (8, "x"),
        (9, 10.5),
        (10, 0),
        (11, ["a"] * 17),
    ):
        changed.append([*good[:place], value, *good[place + 1 :]])
    for array in changed:
        payload = msgspec.msgpack.encode(array)
        with pytest.raises(ProtocolError):
            decode(payload)
        assert problems(prompt, payload), array
    for short in (good[:7], good[:9]):  # fields with a default may be left out
        payload = msgspec.msgpack.encode(short)
        assert isinstance(decode(payload), Prompt)
        assert problems(prompt, payload) == []


def test_channels_are_the_rows_and_operations_what_a_client_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    row = msgspec.structs.replace(topics.PROMPT, pattern="c/{cluster}/a/{agent}/from/{client}/question")
    monkeypatch.setattr(topics, "TABLE", (*topics.TABLE, row))
    document = asyncapi.document()
    assert len(document["channels"]) == len(topics.TABLE)
    channel = document["channels"]["c.cluster.a.agent.from.client.question"]
    assert channel["address"] == f"{topics.DEFAULT_ROOT}/{row.pattern}"
    assert channel["parameters"].keys() == {"cluster", "agent", "client"}
    assert document["operations"]["send.c.cluster.a.agent.from.client.question"]["action"] == "send"
    assert "receive.c.cluster.a.agent.from.client.question" not in document["operations"]
    assert "| `c/{cluster}/a/{agent}/from/{client}/question` | Prompt |" in parts()["topics"]


def parsed(document: Path) -> Any:
    folder = npm.installed(ROOT / "tests" / "node")
    command = ["node", "asyncapi.mjs", str(document)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_asyncapis_own_parser_finds_no_fault(tmp_path: Path) -> None:
    told = parsed(DOCUMENT)
    serious = [one for one in told["found"] if one["severity"] < 2]
    assert serious == []
    assert told["version"] == asyncapi.ASYNCAPI
    assert told["messages"] == len(KINDS)
    broken = tmp_path / "broken.json"
    text = DOCUMENT.read_text("utf-8")
    broken.write_text(text.replace('"action": "send"', '"action": "shout"'), "utf-8")
    assert [one for one in parsed(broken)["found"] if one["severity"] == 0]
