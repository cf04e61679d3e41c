"""Writes the tables of parameters in docs/api.md: `python -m fedhlm_doors.tables docs/api.md`."""

import json
import sys
from collections.abc import Iterator
from typing import Final

from fedhlm.marks import cell, rewrite
from fedhlm_doors import formats, ollama, openai, tools
from fedhlm_doors.parameters import Parameter, Table

TABLES: Final[dict[str, Table]] = {
    "`POST /v1/chat/completions`": openai.CHAT,
    "Messages of `/v1/chat/completions`": openai.MESSAGE,
    "`POST /v1/completions`": openai.COMPLETION,
    "`stream_options` of both": openai.STREAM_OPTIONS,
    "`structured_outputs` of both": formats.STRUCTURED,
    "`response_format`": formats.RESPONSE_FORMAT,
    "`json_schema` of `response_format`": formats.JSON_SCHEMA,
    "Functions of `tools`, at all doors": tools.FUNCTION,
    "`POST /api/chat`": ollama.CHAT,
    "Messages of `/api/chat`": ollama.MESSAGE,
    "`POST /api/generate`": ollama.GENERATE,
    "`options` of both": ollama.OPTIONS,
}


def tables() -> dict[str, str]:
    """All tables as Markdown, by the name of their mark."""
    return {
        "parameters": "\n".join(f"### {title}\n\n{''.join(_rows(table))}" for title, table in TABLES.items()).rstrip()
    }


def _rows(table: Table) -> Iterator[str]:
    yield "| parameter | | |\n|---|---|---|\n"
    for use in ("used", "no effect", "must be off"):
        for name, parameter in table.items():
            if parameter.use == use:
                yield f"| `{name}` | {use} | {cell(_about(parameter))} |\n"


def _about(parameter: Parameter) -> str:
    if parameter.use != "must be off":
        return parameter.about
    off = ", ".join(f"`{json.dumps(value)}`" for value in parameter.off) or "`null`"
    return f"Rejected unless {off}: {parameter.about}."


if __name__ == "__main__":
    rewrite(sys.argv[1:], tables())
