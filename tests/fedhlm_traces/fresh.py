"""Fresh recordings of the demo's fleet under every preset, each checked: `python -m tests.fedhlm_traces.fresh --count 50`.

None may differ: the same code made both decisions. The exit status is 1 if one does.

The fleet is the demo's, with its requests, on a broker of its own: two clusters, shipped models, real time. Its parts run
in this process, for most of the time of a short demo goes into starting nine processes.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
import logging
import sys
import tempfile
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

import cloud_verifier.__main__ as cloud
import edge_agent.__main__ as agent
import edge_broker.__main__ as edge
from edge_broker.embedded import serve_forever
from fedhlm import settings
from fedhlm.config import Loaded, load, presets
from fedhlm.telemetry import Counters
from fedhlm_fleet.attendance import Place
from fedhlm_fleet.demo.asking import Asker, Task
from fedhlm_fleet.demo.progress import Progress
from fedhlm_fleet.demo.run import RECORDER, Demo
from fedhlm_fleet.processes import PartFailed, Processes
from fedhlm_traces.check.run import check_file
from fedhlm_traces.record import record
from fedhlm_zoo.shipped import with_agent_model, with_cloud_model


class Tasks(Processes):
    """The children of a demo as tasks of this process. Each runs what its command runs."""

    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._told: dict[str, str] = {}
        self._stop_recorder = asyncio.Event()

    async def start(self, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self._tasks[name] = asyncio.create_task(self._work(name, arguments, load(environ=env or {})), name=name)

    def _work(self, name: str, arguments: Sequence[str], loaded: Loaded) -> Coroutine[Any, Any, Any]:
        match arguments:
            case ("edge_broker.embedded", *_):
                return serve_forever(ready=lambda url: self._told.update({name: url}))
            case (_, "record", "--broker", url, "--root", root, "--out", file):
                section = settings.Broker(url=url, root=root)
                return record(section, Path(file), stop=self._stop_recorder)
            case (_, "cloud"):
                return cloud.run(with_cloud_model(loaded).config, Counters())
            case (_, "edge"):
                return edge.run(loaded.config, Counters())
            case (_, "agent"):
                return agent.run(with_agent_model(loaded), Counters())
        raise ValueError(arguments)

    def log_of(self, name: str) -> str:
        return self._told.get(name, "")

    def check(self) -> None:
        for name, task in self._tasks.items():
            if task.done():
                raise PartFailed(f"{name} ended") from (None if task.cancelled() else task.exception())

    async def watch(self) -> None:
        await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        self.check()

    async def end(self, *names: str) -> None:
        tasks = [self._tasks.pop(name) for name in names if name in self._tasks]
        if RECORDER in names:
            self._stop_recorder.set()
        else:
            for task in tasks:
                task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def stop(self) -> None:
        await self.end(*self._tasks)
        await super().stop()


class Recorded(Demo):
    """A demo that ends with its recording: no text is compared with what the models write alone."""

    children: ClassVar[type[Processes]] = Tasks
    requests = 0
    answered = 0

    async def _tell(self, asker: Asker, progress: Progress) -> None:
        del progress
        await asker.wait_ready()
        shares: dict[Place, Iterator[Task]] = {
            place: itertools.islice(tasks, -(-self.requests // len(self.places)))
            for place, tasks in self.shares().items()
        }
        await self._work(asker, shares, None, None)
        self.answered = sum(not request.error for request in asker.requests)


def checked(preset: str, seed: int, requests: int, tokens: int) -> tuple[int, str]:
    """Record a fleet and check it; return how many requests were answered, and what differs, empty if nothing does."""
    told = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "fresh.trace")
        demo = Recorded(
            preset=preset, prompts=None, tokens=tokens, seed=seed, broker="", duration_s=0.0, recording=file
        )
        demo.requests = requests
        asyncio.run(demo.run(Console(file=io.StringIO())))
        with contextlib.redirect_stdout(told):
            code = check_file(file)
    return demo.answered, told.getvalue() if code else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Record and check; print a line for each preset."""
    parser = argparse.ArgumentParser(prog="fresh", description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="recordings of each preset")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first")
    parser.add_argument("--preset", nargs="*", default=list(presets()), help="presets, by default all")
    parser.add_argument("--requests", type=int, default=24, help="requests of each recording")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each text")
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    failed = 0
    for preset in given.preset:
        seeds = range(given.seed, given.seed + given.count)
        found = [checked(preset, seed, given.requests, given.tokens) for seed in seeds]
        differing = [text for _, text in found if text]
        failed += len(differing)
        requests = sum(answered for answered, _ in found)
        print(f"{preset:<12} {given.count} recordings of {requests} requests, {len(differing)} differ", flush=True)
        for text in differing:
            print(text)
        if requests == 0:
            raise SystemExit("no request was answered")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
