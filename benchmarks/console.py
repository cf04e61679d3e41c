"""The console's page under a large fleet: how long the browser's tasks are, from Chromium's own trace.

python benchmarks/console.py --agents 200 --updates 60 --seconds 20
"""

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from fedhlm.bus.party import Stamp, presence
from fedhlm.protocol.messages import Fingerprint, Output, Prompt
from fedhlm.protocol.sources import SOURCES
from fedhlm_doors.console import ConsolePage
from fedhlm_doors.serving import page
from fedhlm_fleet.console.feeds import LiveFeed
from fedhlm_fleet.console.state import ConsoleState
from fedhlm_fleet.console.texts import Pieces
from tests.browser import CHROMIUM, Browser, browser

SMALL: Final = Fingerprint("abc", 4_096, "philox-1", "small")
CLUSTERS: Final = 10
TOKENS: Final = 64  # of one text
SETTLED_S: Final = 5.0
LONG_MS: Final = 50.0
TASK: Final = ("RunTask", "ThreadControllerImpl::RunTask")


class Crowd:
    """Agents that write texts, one message at a time, in turn."""

    def __init__(self, state: ConsoleState, agents: int) -> None:
        self._state = state
        self._random = random.Random(0)
        self._names = [f"agent-{i:03}" for i in range(agents)]
        self._written = dict.fromkeys(self._names, 0)
        self._next = 0
        for i in range(CLUSTERS):
            edge = presence(Stamp(f"edge-c{i}"), "edge", online=True, upstream=SMALL)
            state.put(edge, {"cluster": f"c{i}"}, time.time())
        for name in self._names:
            state.put(presence(Stamp(name), "agent", online=True, fingerprint=SMALL), self._place(name), time.time())

    def _place(self, name: str) -> dict[str, str]:
        return {"cluster": f"c{int(name[-3:]) % CLUSTERS}", "agent": name}

    def say(self) -> None:
        """One message of the next agent."""
        name = self._names[self._next % len(self._names)]
        self._next += 1
        stamp, count = Stamp(name)(), self._written[name]
        request, position = f"r{count // TOKENS}", count % TOKENS
        if position == 0:
            prompt = Prompt(**stamp, request=request, text="Oil prices rise", max_tokens=TOKENS)
            self._state.put(prompt, self._place(name), time.time())
        self._written[name] += 4
        ends = position + 4 >= TOKENS
        self._state.put(
            Output(
                **Stamp(name)(),
                request=request,
                position=position,
                ids=(1, 2, 3, 4),
                sources=tuple(self._random.choices(tuple(SOURCES), k=4)),  # type: ignore[arg-type]
                text=" some words of text",
                finish="length" if ends else None,
                statistics={"uplink_bytes": 900.0, "round_trips": 4.0, "tau": 0.5, "risk_limit": 0.03} if ends else {},
            ),
            self._place(name),
            time.time(),
        )


def tasks_ms(events: list[dict[str, Any]]) -> list[float]:
    """The lengths of the tasks of the page's main thread, in ms, from a trace."""
    main = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    return [
        event["dur"] / 1e3
        for event in events
        if event.get("name") in TASK and event.get("ph") == "X" and (event["pid"], event["tid"]) in main
    ]


def traced(seen: Browser, seconds: float) -> list[float]:
    """Trace the page for some seconds, and return the lengths of its tasks in ms."""
    found: list[dict[str, Any]] = []
    seen.on["Tracing.dataCollected"] = lambda told: found.extend(told["value"])
    done = threading.Event()
    seen.on["Tracing.tracingComplete"] = lambda _told: done.set()
    seen.command(
        "Tracing.start", whole=True, transferMode="ReportEvents", categories="toplevel,devtools.timeline,__metadata"
    )
    time.sleep(seconds)
    seen.command("Tracing.end", whole=True)
    while not done.is_set():
        seen.value("0")
    return tasks_ms(found)


async def measure(agents: int, updates: float, seconds: float, folder: Path) -> dict[str, Any]:
    """Show a crowd in a browser, and sum up the tasks of the page."""
    state = ConsoleState(lambda: Pieces(None), budget=0.05, confidence=0.95)
    feed, crowd = LiveFeed(state), Crowd(state, agents)

    async def write() -> None:
        began, said = time.monotonic(), 0
        while True:
            await asyncio.sleep(1.0 / updates)
            while said < (time.monotonic() - began) * updates:
                crowd.say()
                said += 1

    async with page(ConsolePage(feed).app(), "127.0.0.1:0", key="--listen") as address:
        working = [asyncio.create_task(write()), asyncio.create_task(feed.tell_pages())]
        try:
            with browser(folder) as seen:
                await asyncio.to_thread(seen.open, address)
                await asyncio.to_thread(
                    seen.until, f"document.querySelectorAll('.part').length === {agents + CLUSTERS}"
                )
                await asyncio.sleep(SETTLED_S)
                lengths = sorted(await asyncio.to_thread(traced, seen, seconds))
                for task in working:
                    assert not task.done(), task
                assert not seen.errors, seen.errors
        finally:
            for task in working:
                task.cancel()
            await asyncio.wait(working)
    return {
        "agents": agents,
        "updates per s": updates,
        "tasks": len(lengths),
        "busy": round(sum(lengths) / 1e3 / seconds, 3),
        "p99 ms": round(lengths[int(0.99 * len(lengths))], 1),
        "longest ms": round(lengths[-1], 1),
        f"over {LONG_MS:g} ms": sum(length > LONG_MS for length in lengths),
    }


def main() -> None:
    """Parse the command line and print the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=200)
    parser.add_argument("--updates", type=float, default=60.0, help="messages a second of the whole fleet")
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("console.py: chromium must be installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        print(json.dumps(asyncio.run(measure(given.agents, given.updates, given.seconds, Path(folder)))))


if __name__ == "__main__":
    main()
