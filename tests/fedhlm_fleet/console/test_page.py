"""The console as its readers meet it: over HTTP, against a real broker, and in a browser."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.interface import Retained
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Stamp, presence
from fedhlm.errors import BusError, ConfigError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Fingerprint, Output
from fedhlm.settings import Broker
from fedhlm_doors.console import FILES, Ask, ConsolePage, TypedPrompt
from fedhlm_doors.serving import page
from fedhlm_fleet.console.feeds import BEHIND_MAX, LiveFeed, RecordedFeed
from fedhlm_fleet.console.state import ConsoleState
from fedhlm_fleet.console.texts import Pieces
from fedhlm_traces.file import read
from tests.brokers import free_port
from tests.browser import CHROMIUM, Browser, browser
from tests.npm import installed

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL = Fingerprint("abc", 4_096, "philox-1", "small")


def state() -> ConsoleState:
    return ConsoleState(lambda: Pieces(None), budget=0.05, confidence=0.95)


def output(position: int, text: str, **options: Any) -> Output:
    words = {"request": "r", "ids": (1,), "sources": ("local",), **options}
    return Output(**Stamp("porch")(), position=position, text=text, **words)


async def events(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    name = ""
    async for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - the state tells nobody
        await asyncio.sleep(0.02)


@asynccontextmanager
async def open_page(feed: LiveFeed, ask: Ask | None = None) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        page(ConsolePage(feed, ask).app(), "127.0.0.1:0", key="--listen") as address,
        httpx.AsyncClient(base_url=address, timeout=30.0, trust_env=False) as client,
    ):
        yield client


async def test_the_page_brings_everything_itself_and_lets_nothing_else_in() -> None:
    async with open_page(LiveFeed(state())) as client:
        for path in FILES:
            answer = await client.get(path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert not re.findall(r"https?://", answer.text), "no other host is asked for anything"
        assert (await client.get("/state", headers={"host": "fedhlm.evil.example"})).status_code == 403
        assert (await client.get("/events", headers={"host": "fedhlm.evil.example"})).status_code == 403
        assert (await client.get("/state?at=nan")).status_code == 400
        assert (await client.post("/state")).status_code == 405, "it only shows"
        assert (await client.get("/console_page/../serving.py")).status_code == 404


async def test_the_page_asks_only_where_prompts_are_allowed_and_only_for_itself() -> None:
    asked: list[TypedPrompt] = []

    async def ask(wanted: TypedPrompt) -> None:
        if wanted.agent == "shed":
            raise BusError("shed is not online")
        asked.append(wanted)

    wanted = {"cluster": "home", "agent": "porch", "text": "Oil"}
    async with open_page(LiveFeed(state())) as client:
        own = str(client.base_url).rstrip("/")
        assert (await client.post("/ask", json=wanted, headers={"origin": own})).status_code == 404
        assert (await client.get("/state")).json()["asks"] is False
    async with open_page(LiveFeed(state()), ask) as client:
        own = str(client.base_url).rstrip("/")
        assert (await client.get("/state")).json()["asks"] is True
        for headers in (
            {},
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": own.replace("http", "https")},
        ):
            assert (await client.post("/ask", json=wanted, headers=headers)).status_code == 403, headers
        form = {"origin": own, "content-type": "text/plain"}
        assert (await client.post("/ask", content=json.dumps(wanted), headers=form)).status_code == 415
        named = {"origin": "http://fedhlm.evil.example", "host": "fedhlm.evil.example"}
        assert (await client.post("/ask", json=wanted, headers=named)).status_code == 403
        assert (await client.get("/ask")).status_code == 405
        for wrong in ({}, wanted | {"text": ""}, wanted | {"text": "x" * 4_001}, wanted | {"tokens": 9}, [1]):
            assert (await client.post("/ask", json=wrong, headers={"origin": own})).status_code == 400, wrong
        gone = await client.post("/ask", json=wanted | {"agent": "shed"}, headers={"origin": own})
        assert (gone.status_code, gone.json()) == (502, {"error": "shed is not online"})
        assert asked == []
        assert (await client.post("/ask", json=wanted, headers={"origin": own})).status_code == 200
    assert asked == [TypedPrompt("home", "porch", "Oil")]


async def test_only_this_machine_is_served() -> None:
    with pytest.raises(ConfigError, match=r"--listen must be a loopback address; others .* \(got '0\.0\.0\.0:0'\)"):
        async with page(ConsolePage(LiveFeed(state())).app(), "0.0.0.0:0", key="--listen"):
            pass


BROKEN_OFF = (
    b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"POST /ask HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{",
)


@pytest.mark.parametrize("request_", BROKEN_OFF, ids=["stream", "prompt"])
@pytest.mark.parametrize("leaves", ["page", "console"])
async def test_a_page_or_a_console_that_is_closed_is_no_error(
    leaves: str, request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask(_wanted: TypedPrompt) -> None:
        raise AssertionError("no prompt was whole")

    async with page(ConsolePage(LiveFeed(state()), ask).app(), "127.0.0.1:0", key="--listen") as address:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(httpx.URL(address).port or 0))
        writer.write(request_)
        if request_.startswith(b"GET"):
            await reader.readuntil(b"event: state")
        else:
            await asyncio.sleep(0.2)  # it has no answer by which to see that it has come
        if leaves == "page":
            writer.transport.abort()
    writer.transport.abort()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_page_gets_everything_and_then_every_change_once() -> None:
    shown = state()
    feed = LiveFeed(shown)
    shown.put(output(0, "before"), {"cluster": "home", "agent": "porch"}, 1.0)
    async with open_page(feed) as client, client.stream("GET", "/events") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        told = events(answer.aiter_lines())
        name, whole = await anext(told)
        assert (name, whole["length"]) == ("state", None)
        assert [t[0] for t in whole["texts"][0]["tokens"]] == ["before"]
        shown.put(output(1, " after"), {"cluster": "home", "agent": "porch"}, 2.0)
        feed.tell()
        name, change = await anext(told)
        assert name == "change"
        assert (change["texts"][0]["from"], change["texts"][0]["tokens"]) == (
            1,
            [[" after", "local", None, None, None, None, 1_000]],
        )


async def test_a_page_that_falls_behind_begins_anew() -> None:
    shown = state()
    feed = LiveFeed(shown)
    slow = feed.follow()
    await anext(slow)
    for i in range(BEHIND_MAX + 1):
        shown.put(output(i, "x"), {"cluster": "home", "agent": "porch"}, float(i))
        feed.tell()
    assert [change async for change in slow] == []


async def test_it_hears_a_broker_and_says_nothing_there() -> None:
    port = free_port()
    broker = EmbeddedBroker(host="127.0.0.1", port=port)
    shown = state()
    feed = LiveFeed(shown)
    async with broker:
        name = topics.AGENT_STATUS.name(cluster="home", agent="porch")
        birth = Retained(name, encode(presence(Stamp("porch"), "agent", online=True, fingerprint=SMALL)))
        async with MqttBus(f"mqtt://127.0.0.1:{port}", client_id="porch", birth=birth) as agent:
            listening = asyncio.create_task(feed.listen([Broker(url=f"mqtt://127.0.0.1:{port}")], "console-1"))
            async with asyncio.timeout(30.0):
                await until(lambda: bool(shown.snapshot()["parts"]))
                to = topics.OUTPUT.name(cluster="home", agent="porch", client="me")
                await agent.publish(to, encode(output(0, "hello")), qos=1)
                await until(lambda: bool(shown.snapshot()["texts"]))
            assert agent.statistics.messages_in == 0, "it publishes nothing, not even its presence"
            listening.cancel()
            await asyncio.wait([listening])


def test_a_broker_that_is_not_there_is_named_in_one_line() -> None:
    arguments = "--broker", f"mqtt://127.0.0.1:{free_port()}", "--broker.connect_timeout_s", "1"
    done = subprocess.run(
        [sys.executable, "-m", "fedhlm_fleet.cli", "console", "--listen", "127.0.0.1:0", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fedhlm: "), done.stderr
    assert BusError.__name__ not in done.stderr


@contextmanager
def console(*arguments: str) -> Iterator[str]:
    """A running console's address."""
    command = [sys.executable, "-m", "fedhlm_fleet.cli", "console", "--listen", "127.0.0.1:0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("open ").strip()
        finally:
            process.terminate()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_a_recording_without_an_error(tmp_path: Path) -> None:
    with console("--trace", str(GOLDEN / "budget.trace")) as address, browser(tmp_path) as seen:
        for width, dark in ((1440, False), (360, True)):
            seen.open(f"{address}?{width}#at=60", width=width, dark=dark)
            seen.until("document.querySelectorAll('#written .t').length > 0")
            assert seen.value("document.getElementById('link').textContent") == "recording"
            seen.until("document.getElementById('at').textContent.startsWith('60.0 / ')")
            seen.until("document.querySelectorAll('.part:not(.off):not(.ill)').length === 7")
            assert seen.value("document.getElementById('well').hidden") is False, "nothing is wrong at that second"
            assert seen.value("document.documentElement.scrollWidth <= innerWidth"), f"{width} px are enough"
            assert seen.value("document.querySelector('[role=meter]').getAttribute('aria-valuenow') > 0")
            assert seen.value("document.querySelector('.track .limit').offsetWidth > 5")

            # By keyboard alone, from token to token.
            seen.value("document.getElementById('written').focus()")
            before = seen.value("document.getElementById('texts').offsetHeight")
            seen.press("End")
            assert "Token " in seen.value("document.getElementById('detail').textContent")
            seen.press("Home")
            assert seen.value("document.getElementById('detail').textContent").startswith("Token 1, ")
            seen.press("ArrowRight")
            assert seen.value("document.querySelectorAll('.t.at').length") <= 1
            assert seen.value("document.getElementById('texts').offsetHeight") - before <= 24, "nothing jumps"

            # To the recording's end, where everything has stopped.
            seen.value("(goto(length), 0)")
            seen.until("document.querySelectorAll('.part.off').length === 7")
            assert seen.value("document.querySelectorAll('#wrongs li').length") >= 7
            assert seen.value("document.querySelectorAll('#log li').length") > 10
            seen.value("document.querySelector('#kinds input[value=offline]').click()")
            assert seen.value("document.querySelectorAll('#log .offline').length") == 0

            # What happened over time, in pictures and in words.
            seen.until("document.querySelectorAll('#routing rect').length > 5")
            seen.until("document.querySelectorAll('#rounds polyline').length >= 4")
            words = seen.value("document.getElementById('rounds').textContent")
            assert re.search(r"All clusters, round \d+: threshold [\d.]+; m\(u\) [\d.]+ at u = 0.1", words)
            sent, law = (
                float(seen.value(f"parseFloat(document.getElementById('cost-{name}').textContent.replace(',', ''))"))
                for name in ("sent", "law")
            )
            assert 0.0 < sent < law == 8_192.0
            assert seen.value("document.querySelector('.part .remedy').textContent").startswith(
                "offline. To do: start it"
            )
            assert seen.value("document.getElementById('ask').hidden"), "a recording answers nobody"
            assert seen.value("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
async def test_a_browser_keeps_what_it_had_when_the_console_starts_again(tmp_path: Path) -> None:
    here = {"cluster": "home", "agent": "porch"}
    listen = f"127.0.0.1:{free_port()}"

    def shows(word: str) -> str:
        return f"[...texts.values()].some(text => text.tokens.some(token => token[0] === '{word}'))"

    with browser(tmp_path, expected=r"/events") as seen:
        for request, word in (("one", "first"), ("two", "<b>second</b>")):
            shown = state()
            feed = LiveFeed(shown)
            async with page(ConsolePage(feed).app(), listen, key="--listen") as address:
                if request == "one":
                    await asyncio.to_thread(seen.open, address)
                    await asyncio.to_thread(seen.until, "document.getElementById('link').textContent === 'live'")
                shown.put(output(0, word, request=request), here, 1.0)
                feed.tell()
                await asyncio.to_thread(seen.until, shows(word))
        assert await asyncio.to_thread(seen.value, shows("first")), "the new server does not know it"
        assert await asyncio.to_thread(seen.until, "document.getElementById('written').textContent === '<b>second</b>'")
        assert await asyncio.to_thread(seen.value, "document.querySelectorAll('#written b').length") == 0


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_links_lead_to_a_text_a_second_and_kinds_of_events(tmp_path: Path) -> None:
    with console("--trace", str(GOLDEN / "budget.trace")) as address, browser(tmp_path) as seen:
        seen.open(f"{address}#at=60&hide=round,online")
        seen.until("asking === false && document.getElementById('at').textContent.startsWith('60.0 / ')")
        assert seen.value("document.querySelectorAll('#log .round, #log .online').length") == 0
        seen.value("document.querySelector('#kinds input[value=online]').click()")
        assert seen.value("location.hash") == "#at=60&hide=round"
        # An event of a recording links to its second, and keeps what else is chosen.
        seen.value("document.querySelector('#log li:last-child a').click()")
        seen.until("!document.getElementById('at').textContent.startsWith('60.0') && asking === false")
        assert re.fullmatch(r"#at=\d\.\d&hide=round", seen.value("location.hash"))
        seen.value("(location.hash = '#at=60', 0)")
        checked = "texts.size > 0 && [...texts.values()].find(t => t.tokens.some(token => token[5] === false))"
        found = seen.until(f"asking === false && asked === null && ({checked})")
        seen.value(f"(location.hash = '#at=60&text={found['id']}', 0)")
        seen.until(f"shown === '{found['id']}' && document.getElementById('which').value === shown")
        # Where the text was committed without the LLM, what it said later; where the draft is known, the doubt as a bar.
        assert seen.value("document.querySelectorAll('#written .missed').length") >= 1
        bar = "parseFloat(getComputedStyle(document.querySelector('#written .t')).borderBottomWidth) <= 5"
        assert seen.value(bar)
        seen.value("document.querySelector('#written .missed').click()")
        told = seen.value("document.getElementById('detail').textContent")
        assert re.search(r"the LLM has looked at it later and would have written another; doubt u = [\d.]+", told), told
        assert re.search(
            r"; threshold [\d.]+; .*\d ms after the prompt; [\d.]+ bytes up per token of this text\.$", told
        )


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
async def test_a_text_that_is_being_written_stays_and_nothing_jumps_when_another_comes(tmp_path: Path) -> None:
    shown = state()
    feed = LiveFeed(shown)

    def write(request: str, position: int, text: str, **options: Any) -> None:
        shown.put(output(position, text, request=request, **options), {"cluster": "home", "agent": "porch"}, 1.0)
        feed.tell()

    watch = (
        "(new PerformanceObserver(list => list.getEntries().forEach(e => { if (!e.hadRecentInput) jumps += e.value; }))"
        ".observe({type: 'layout-shift'}), window.jumps = 0)"
    )
    async with page(ConsolePage(feed).app(), "127.0.0.1:0", key="--listen") as address:
        with browser(tmp_path) as seen:
            write("one", 0, "first")
            await asyncio.to_thread(seen.open, address)
            await asyncio.to_thread(seen.until, "document.getElementById('written').textContent === 'first'")
            await asyncio.to_thread(seen.value, watch)
            # However slow this machine is, the page's clock stands until the other text is there.
            stop = "(window.run = performance.now.bind(performance), performance.now = () => 0, 0)"
            await asyncio.to_thread(seen.value, stop)
            write("two", 0, "second")
            await asyncio.to_thread(seen.until, "texts.size === 2 && !pending")
            assert await asyncio.to_thread(seen.value, "document.getElementById('written').textContent") == "first"
            await asyncio.to_thread(seen.value, "(performance.now = window.run, 0)")
            write("one", 1, " and last", finish="stop")
            written = "document.getElementById('written').textContent"
            await asyncio.to_thread(seen.until, f"{written} === 'first and last'")
            write("two", 1, " ones " * 200)
            await asyncio.to_thread(seen.until, f"{written}.startsWith('second ones')")
            assert await asyncio.to_thread(seen.value, "jumps") == 0


def test_an_error_on_the_console_fails_a_test(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    for script in ("console.error('no')", "setTimeout(() => { throw new Error('no'); })"):
        with pytest.raises(AssertionError, match="no"), browser(tmp_path) as seen:
            seen.value(f"new Promise(done => {{ {script}; setTimeout(() => done(0), 50); }})")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
async def test_the_page_breaks_no_rule_of_accessibility(tmp_path: Path) -> None:
    rules = (installed(Path(__file__).parents[2] / "axe") / "node_modules" / "axe-core" / "axe.min.js").read_text(
        "utf-8"
    )
    feed = RecordedFeed(read(GOLDEN / "budget.trace"), state)
    assert feed.length_s is not None
    seconds = (30, int(feed.length_s))  # at work, and when all has stopped

    async def ask(_wanted: TypedPrompt) -> None:
        pass

    def broken(seen: Browser) -> list[str]:
        seen.value(rules + ";0")
        told = seen.value("axe.run({resultTypes: ['violations']}).then(found => JSON.stringify(found.violations))")
        return [f"{rule['id']}: {node['html'][:120]}" for rule in json.loads(told) for node in rule["nodes"]]

    def looked(address: str, seen: Browser) -> None:
        for width, dark in ((1440, False), (1440, True), (360, False), (360, True)):
            for second in seconds:
                seen.open(f"{address}?{width}{dark}{second}#at={second}", width=width, dark=dark)
                seen.until(f"document.getElementById('at').textContent.startsWith('{second}.0 / ')")
                seen.until("document.querySelectorAll('#routing rect').length > 5")
                assert broken(seen) == [], (width, dark, second)
        seen.value("document.getElementById('which').parentElement.querySelector('label').remove()")
        assert {found.split(":")[0] for found in broken(seen)} >= {"select-name"}, "the rules are looked at"

    async with page(ConsolePage(feed, ask).app(), "127.0.0.1:0", key="--listen") as address:
        with browser(tmp_path) as seen:
            await asyncio.to_thread(looked, address, seen)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
async def test_a_browser_asks_an_agent_where_prompts_are_allowed(tmp_path: Path) -> None:
    asked: list[TypedPrompt] = []
    shown = state()

    async def ask(wanted: TypedPrompt) -> None:
        asked.append(wanted)

    shown.put(
        presence(Stamp("porch"), "agent", online=True, fingerprint=SMALL), {"cluster": "home", "agent": "porch"}, 1.0
    )
    async with page(ConsolePage(LiveFeed(shown), ask).app(), "127.0.0.1:0", key="--listen") as address:
        with browser(tmp_path) as seen:
            await asyncio.to_thread(seen.open, address)
            await asyncio.to_thread(seen.until, "document.getElementById('whom').value === 'home/porch'")
            await asyncio.to_thread(seen.value, "(document.getElementById('words').value = 'Oil', 0)")
            await asyncio.to_thread(seen.value, "document.getElementById('send').click()")
            await asyncio.to_thread(seen.until, "document.getElementById('asked').textContent === 'porch has answered'")
    assert asked == [TypedPrompt("home", "porch", "Oil")]
