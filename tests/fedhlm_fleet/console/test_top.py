"""`fedhlm top`: what it draws, with and without a terminal."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.interface import Retained
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Stamp, presence
from fedhlm.decoding.models import tokenizer_at
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Fingerprint
from fedhlm.protocol.sources import SOURCES
from fedhlm_fleet.colours import STYLES, WORDS
from fedhlm_fleet.console.feeds import RecordedFeed
from fedhlm_fleet.console.screen import screen, shown_limit, shown_tau
from fedhlm_fleet.console.state import ConsoleState
from fedhlm_fleet.console.texts import Pieces
from fedhlm_traces.file import read
from fedhlm_zoo.shipped import model_folder
from tests.brokers import free_port

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL = Fingerprint("abc", 4_096, "philox-1", "small")


def state() -> ConsoleState:
    tokenizer = tokenizer_at(model_folder("", "slm"))[0]
    return ConsoleState(lambda: Pieces(tokenizer), budget=0.05, confidence=0.95)


def drawn(feed: RecordedFeed, at_s: float | None, width: int) -> str:
    terminal = Console(width=width, force_terminal=False, color_system=None)
    with terminal.capture() as capture:
        terminal.print(screen(feed.snapshot(at_s)))
    return capture.get()


def test_every_source_has_a_style_and_a_word_of_its_own() -> None:
    assert STYLES.keys() == WORDS.keys() == SOURCES.keys()
    assert len(set(STYLES.values())) == len(STYLES)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_fleet_at_work_and_at_its_end_fits_the_terminal(width: int) -> None:
    feed = RecordedFeed(read(GOLDEN / "budget.trace"), state)
    at_work, at_the_end = drawn(feed, feed.opens_s, width), drawn(feed, None, width)
    assert at_work.splitlines()[0].startswith("7 of 7 parts online; error at most 3.")
    assert "!" not in at_work
    assert "! cloud: offline" in at_the_end
    assert at_the_end.splitlines()[0].startswith("0 of 7 parts online")
    assert all(len(line) <= width for line in (at_work + at_the_end).splitlines())
    assert "\x1b" not in at_work


def test_a_threshold_that_keeps_nothing_and_a_limit_without_evidence_are_none() -> None:
    told = [shown_tau(None), shown_tau(-1.0), shown_tau(0.0), shown_limit(None), shown_limit(1.0), shown_limit(0.021)]
    assert told == ["", "none", "0.000", "", "none", "2.1%"]


def test_tokens_are_coloured_by_who_decided_them() -> None:
    feed = RecordedFeed(read(GOLDEN / "budget.trace"), state)
    text = next(t for t in feed.snapshot()["texts"] if {token[1] for token in t["tokens"]} >= {"local", "cloud"})
    terminal = Console(width=400, force_terminal=True, color_system="standard", no_color=False)
    with terminal.capture() as capture:
        terminal.print(screen(feed.snapshot() | {"texts": [text]}))
    codes = {"local": "\x1b[36m", "cloud": "\x1b[33m"}
    for word, source, *_ in text["tokens"]:
        if source in codes:
            assert codes[source] + word.replace("\n", " ") in capture.get(), word


async def test_without_a_terminal_one_screen_is_printed() -> None:
    port = free_port()
    async with EmbeddedBroker(host="127.0.0.1", port=port):
        name = topics.AGENT_STATUS.name(cluster="home", agent="porch")
        birth = Retained(name, encode(presence(Stamp("porch"), "agent", online=True, fingerprint=SMALL)))
        async with MqttBus(f"mqtt://127.0.0.1:{port}", client_id="porch", birth=birth) as agent:
            await agent.wait_connected()
            command = [sys.executable, "-m", "fedhlm_fleet.cli", "top", "--broker", f"mqtt://127.0.0.1:{port}"]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 1 parts online" in done.stdout
    assert "no edge has announced itself in cluster home" in done.stdout
