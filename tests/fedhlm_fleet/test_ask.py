"""`fedhlm ask` as a user runs it, against an agent that says what a test wants it to say, on both brokers."""

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_broker.embedded import EmbeddedBroker
from fedhlm.answers import Marks, Piece
from fedhlm.bus.interface import Retained
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.decoding.grammar import of_regex, of_schema
from fedhlm.decoding.models import tokenizer_at
from fedhlm.errors import ConfigError, FedhlmError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import Source
from fedhlm.protocol.messages import Cancel, Output, Prompt
from fedhlm.telemetry import Counters
from fedhlm_fleet.commands.ask import read_form, read_words
from fedhlm_fleet.commands.paper import Coloured
from fedhlm_fleet.console.texts import Pieces
from fedhlm_zoo.shipped import model_folder
from tests.brokers import Mosquitto
from tests.processes import obey_interrupts

LIMIT_S = 60.0


class Actor:
    """An agent in cluster `barn` that writes `sources`, one token each, and then ends, unless it is `endless`."""

    def __init__(self, url: str, sources: tuple[Source, ...], *, endless: bool = False, **end: Any) -> None:
        stamp = Stamp("porch")
        topic = topics.AGENT_STATUS.name(cluster="barn", agent="porch")
        birth, will = (Retained(topic, encode(presence(stamp, "agent", online=online))) for online in (True, False))
        bus = MqttBus(url, client_id="barn-porch", birth=birth, will=will, connect_timeout_s=10.0)
        self.party = Party(bus=bus, stamp=stamp, counters=Counters())
        self.sources, self.endless, self.end = sources, endless, {"finish": "length", **end}
        self.prompts: list[Prompt] = []
        self.cancelled = asyncio.Event()

    async def serve(self) -> None:
        async for received in self.party.received():
            match received.message:
                case Prompt() as prompt:
                    self.prompts.append(prompt)
                    for position, source in enumerate(self.sources):
                        await self.say(prompt, position, ids=(position,), sources=(source,), text=f" {position}")
                    if not self.endless:
                        await self.say(prompt, len(self.sources), **{"statistics": {"tau": 0.5}, **self.end})
                case Cancel():
                    self.cancelled.set()

    async def say(self, prompt: Prompt, position: int, **fields: Any) -> None:
        named = {"ids": (), "sources": (), "text": "", **fields}
        output = Output(**self.party.stamp(), request=prompt.request, position=position, **named)
        await self.party.send(topics.OUTPUT, output, cluster="barn", agent="porch", client=output.client or "ask")


@asynccontextmanager
async def playing(url: str, *sources: Source, **options: Any) -> AsyncIterator[Actor]:
    actor = Actor(url, sources, **options)
    place = {"cluster": "barn", "agent": "porch"}
    async with actor.party.bus:
        await actor.party.bus.subscribe(
            *(row.name(**place, client="+") for row in (topics.PROMPT_FROM, topics.CANCEL_FROM))
        )
        task = asyncio.create_task(actor.serve())
        yield actor
        task.cancel()
        await asyncio.wait([task])


async def started(url: str, *words: str | bytes) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "fedhlm_fleet.cli", "ask", *words, "--broker.url", url]
    pipe = asyncio.subprocess.PIPE
    environ = {key: value for key, value in os.environ.items() if not key.startswith("FEDHLM_")}
    return await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=obey_interrupts, env=environ
    )


async def ran(url: str, *words: str | bytes, given: bytes = b"") -> tuple[int, str, str]:
    process = await started(url, *words)
    out, err = await asyncio.wait_for(process.communicate(given), LIMIT_S)
    assert process.returncode is not None
    assert len(err.splitlines()) <= 1, err.decode()
    return process.returncode, out.decode(), err.decode()


async def test_text_streams_and_what_nobody_verified_is_marked(broker: Mosquitto | EmbeddedBroker) -> None:
    async with broker, playing(broker.url, "cloud", "local", "unverified", "unverified", "cloud") as porch:
        code, out, err = await ran(broker.url, "porch", "- Oil", "--tokens", "5", "--seed", "7", "--stop", "x")
        assert (code, out) == (0, " 0 1[unverified:  2 3] 4\n")
        assert err == "fedhlm: nobody has verified 2 of 5 tokens\n"
        (prompt,) = porch.prompts
        assert (prompt.text, prompt.max_tokens, prompt.seed, prompt.stop) == ("- Oil", 5, 7, ("x",))
        assert (prompt.temperature, prompt.preset) == (None, None)

        code, out, err = await ran(
            broker.url, "porch", "-", "--json", "--temperature", "0", "--preset", "exact", given="Ø\n".encode()
        )
        assert (code, err) == (0, "")
        assert json.loads(out) == {
            "text": " 0 1 2 3 4",
            "ids": [0, 1, 2, 3, 4],
            "sources": ["cloud", "local", "unverified", "unverified", "cloud"],
            "finish": "length",
            "statistics": {"tau": 0.5},
        }
        assert (porch.prompts[-1].text, porch.prompts[-1].temperature) == ("Ø\n", 0.0)
        assert porch.prompts[-1].preset == "exact"


async def on_a_terminal(url: str, **environ: str) -> str:
    """What `fedhlm ask` writes on a terminal."""
    ours, theirs = pty.openpty()
    told = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 4_096):
                told.extend(chunk)

    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDHLM_", "NO_COLOR", "FORCE_"))}
    command = [sys.executable, "-m", "fedhlm_fleet.cli", "ask", "porch", "Oil", "--broker.url", url]
    environment = {**kept, "TERM": "xterm-256color", "COLUMNS": "80", **environ}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    reading = asyncio.create_task(asyncio.to_thread(read))
    try:
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0, bytes(told)
        await asyncio.wait_for(reading, LIMIT_S)
    finally:
        os.close(ours)
    return told.decode().replace("\r\n", "\n")


async def test_on_a_terminal_each_token_has_the_colour_of_its_source_and_a_legend_counts_them() -> None:
    async with EmbeddedBroker() as broker, playing(broker.url, "cloud", "local", "peer", "unverified"):
        told = await on_a_terminal(broker.url)
        first, second, *_ = told.splitlines()
        assert first == ("\x1b[33m 0\x1b[0m\x1b[36m 1\x1b[0m\x1b[4;32m 2\x1b[0m[unverified: \x1b[3;91m 3\x1b[0m]"), (
            repr(told)
        )
        plain = re.sub(r"\x1b\[[0-9;]*m", "", second)
        assert plain.split() == ["tokens:", "kept", "1", "peers", "1", "cloud", "1", "unverified", "1"]
        assert "\x1b[36mkept 1" in second
        for quiet in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            assert await on_a_terminal(broker.url, **quiet) == (
                " 0 1 2[unverified:  3]\nfedhlm: nobody has verified 1 of 4 tokens\n"
            )


def test_a_message_with_tokens_of_two_sources_is_coloured_token_by_token() -> None:
    tokenizer = tokenizer_at(model_folder("", "slm"))[0]
    ids = tuple(tokenizer.encode("Oil prices rise", add_special_tokens=False).ids)
    sources: tuple[Source, ...] = tuple("local" if i % 2 else "cloud" for i in range(len(ids)))
    text = tokenizer.decode(list(ids))
    terminal = Console(width=80, force_terminal=True, color_system="standard", no_color=False, highlight=False)
    paper = Coloured(terminal, Pieces(tokenizer))
    with terminal.capture() as capture:
        paper.put(Piece(text, ids, sources, 0))
    told = re.findall(r"\x1b\[(\d+)m([^\x1b]*)\x1b\[0m", capture.get())
    assert "".join(word for _, word in told) == text
    assert [code for code, _ in told] == ["36" if source == "local" else "33" for source in sources]


async def test_ctrl_c_cancels_and_exits_130(broker: Mosquitto | EmbeddedBroker) -> None:
    async with broker, playing(broker.url, "cloud", "local", endless=True) as porch:
        process = await started(broker.url, "porch", "Oil")
        assert process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            assert await process.stdout.readexactly(4) == b" 0 1"
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
            assert process.returncode == 130, err.decode()
            assert err == b""
            await porch.cancelled.wait()


async def test_what_did_not_come_whole_exits_1_and_says_why() -> None:
    async with EmbeddedBroker() as broker:
        url = broker.url
        assert await ran(url, "shed", "Oil", "--wait", "0.5") == (
            1,
            "",
            "fedhlm: shed is not online in any cluster at this broker\n",
        )
        async with playing(url, "cloud", finish="error", error="no such preset") as porch:
            assert await ran(url, "porch", "Oil") == (1, " 0\n", "fedhlm: no such preset\n")
            code, out, _ = await ran(url, "porch", "Oil", "--json")
            told = json.loads(out)
            assert (code, told["finish"], told["error"], told["ids"]) == (1, "error", "no such preset", [0])
            code, out, err = await ran(url, "porch", "Oil", "--cluster", "home", "--wait", "0.5")
            assert (code, out) == (1, "")
            assert "porch is not online in cluster home at this broker (it is in barn)" in err
            assert len(porch.prompts) == 2
        async with playing(url, "cloud", endless=True) as porch:
            code, out, err = await ran(url, "porch", "Oil", "--deadline", "1")
            assert (code, out) == (1, " 0\n")
            assert "not whole within 1 s (1 tokens came)" in err
            await asyncio.wait_for(porch.cancelled.wait(), LIMIT_S)


@pytest.mark.parametrize(
    ("words", "given", "said"),
    [
        (("porch", "-"), b"a\xff", "text must be UTF-8"),
        (("porch", b"a\xff"), b"", "Unicode characters"),
        (("porch", "Oil", "--tokens", "65537"), b"", "--tokens"),
        (("porch", "Oil", "--temperature", "nan"), b"", "temperature"),
        (("a/b", "Oil"), b"", "agent"),
        (("porch", "Oil", "--cluster", "+"), b"", "cluster"),
        (("porch",), b"", "AGENT TEXT"),
        (("porch", "Oil", "prices"), b"", "quote a text"),
        (("porch", "Oil", "--tokns", "5"), b"", "--tokns is not an option of fedhlm ask: did you mean --tokens?"),
        (("porch", "Oil", "--brokr.url", "x"), b"", "did you mean"),
    ],
)
async def test_what_cannot_be_used_is_one_line_before_any_broker_is_asked(
    words: tuple[str | bytes, ...], given: bytes, said: str
) -> None:
    code, out, err = await ran("mqtt://127.0.0.1:1", *words, given=given)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("fedhlm: ")


async def test_a_broker_that_is_not_there_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = await ran("mqtt://127.0.0.1:1", "porch", "Oil", "--broker.connect_timeout_s", "0.5")
    assert (code, out) == (1, "")
    assert "not reached within 0.5 s" in err


def test_words_are_an_agent_a_text_and_flags_in_any_order() -> None:
    assert read_words(["--broker.root", "x/1", "porch", "- Oil"]) == ("porch", "- Oil", ["--broker.root", "x/1"])
    assert read_words(["porch", "--broker.root=x/1", "-5"]) == ("porch", "-5", ["--broker.root=x/1"])
    assert read_words(["porch", "--- and so on"]) == ("porch", "--- and so on", [])
    with pytest.raises(FedhlmError, match="is not an option of fedhlm ask"):
        read_words(["porch", "--help-me"])


def test_marks_open_and_close_around_runs_of_unverified_text() -> None:
    def shown(*sources: tuple[Source, ...]) -> str:
        marks = Marks()
        pieces = [Piece(f"<{len(s)}>", tuple(range(len(s))), s, 0) for s in sources]
        return "".join(map(marks.put, pieces)) + marks.end()

    assert shown(("cloud",), ("local", "peer")) == "<1><2>"
    assert shown(("unverified",), (), ("cloud",)) == "[unverified: <1><0>]<1>"
    assert shown(("cloud",), ("unverified", "cloud"), ()) == "<1>[unverified: <2><0>]"


def test_the_form_of_an_answer_becomes_its_grammar(tmp_path: Path) -> None:
    schema, lark = tmp_path / "schema.json", tmp_path / "form.lark"
    schema.write_text('{"type": "object"}')
    lark.write_text('start: "yes" | "no"')
    assert read_form(None, None, None) is None
    assert read_form(schema, None, None) == of_schema({"type": "object"})
    assert read_form(None, "a+/b", None) == of_regex("a+/b")
    assert read_form(None, None, lark) == 'start: "yes" | "no"'


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_a_file_that_holds_no_schema_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--schema must be a file .*schema\.json"):
        read_form(file, None, None)


def test_an_answer_has_one_form_at_most(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--grammar must be left out where --regex is given \(got '"):
        read_form(None, "a", tmp_path)
