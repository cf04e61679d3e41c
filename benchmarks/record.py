"""How many messages a second the recorder takes without loss, and how exactly a replay keeps time; over a local mosquitto.

A separate process publishes messages like the agents' escalations at a given rate; loss is what was published and is not in the
file. Run: python benchmarks/record.py [--rates 1000 3000 6000] [--seconds 10] [--payload 120] [--qos 1] [--patient]
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from fedhlm.process.leash import leashed
from fedhlm.settings import Broker
from fedhlm_lab.studies.command_line import COUNT, Parser, limited
from fedhlm_traces.file import Header, Record, Writer, read
from fedhlm_traces.record import Summary, record
from fedhlm_traces.replay import replay

TOPIC = "fedhlm/1/c/home/escalate/agent-{}"
AGENTS = 20
CHUNK_S = 0.01
SILENCE_S = 4.0
NOISE_BYTES = 4 * 1024 * 1024  # more than the compressor looks back within a frame
CONFIG = "listener {port} 127.0.0.1\nallow_anonymous true\n"
# By default mosquitto drops what a subscriber is behind by more than a thousand messages; this finds the recorder's own limit.
PATIENT = "max_queued_messages 0\nmax_inflight_messages 0\n"


@contextlib.contextmanager
def mosquitto(settings: str) -> Iterator[str]:
    """A broker on a free port with these lines more in its configuration; its URL."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise SystemExit("mosquitto is not installed")
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = Path(folder, "mosquitto.conf")
        config.write_text(CONFIG.format(port=port) + settings)
        process = subprocess.Popen(leashed(program, "-c", str(config)), stderr=subprocess.DEVNULL)
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                    break
                time.sleep(0.01)
            yield f"mqtt://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def packet(number: int, payload: bytes, qos: int) -> bytes:
    """One PUBLISH of MQTT 3.1.1, made by hand so that the publisher is never the slowest part."""
    topic = TOPIC.format(number % AGENTS).encode()
    identifier = (number % 65_535 + 1).to_bytes(2, "big") if qos else b""
    body = len(topic).to_bytes(2, "big") + topic + identifier + number.to_bytes(8, "little") + payload
    length = bytes([len(body) & 127 | 128, len(body) >> 7]) if len(body) > 127 else bytes([len(body)])
    return bytes([0x30 | qos << 1]) + length + body


def drain(connection: socket.socket) -> None:
    """Read acknowledgements and forget them."""
    with contextlib.suppress(OSError):
        while connection.recv(65_536):
            pass


def publish(url: str, rate: int, count: int, payload: int, qos: int, ready: Event, go: Event) -> None:
    """Publish `count` numbered messages at `rate` a second, in a process of its own."""
    noise = os.urandom(NOISE_BYTES + payload)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(b"\x10\x13\x00\x04MQTT\x04\x02\x00\x00\x00\x07publish")
        connection.recv(4)
        reader = threading.Thread(target=drain, args=(connection,), daemon=True)
        reader.start()
        ready.set()
        go.wait()
        began = time.monotonic()
        chunk = max(1, int(rate * CHUNK_S))
        for first in range(0, count, chunk):
            numbers = range(first, min(count, first + chunk))
            starts = [n * payload % NOISE_BYTES for n in numbers]
            packets = [packet(n, noise[start : start + payload], qos) for n, start in zip(numbers, starts, strict=True)]
            if (ahead := began + first / rate - time.monotonic()) > 0.0:
                time.sleep(ahead)
            connection.sendall(b"".join(packets))
        print(f"{'':10} published {count:,} in {time.monotonic() - began:.2f} s", flush=True)
        connection.sendall(b"\xe0\x00")
        reader.join()


async def recorded(url: str, out: Path, rate: int, count: int, *, payload: int, qos: int) -> tuple[Summary, float]:
    """The recorder's summary, and the processor seconds of this process."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    publisher = context.Process(target=publish, args=(url, rate, count, payload, qos, ready, go))
    publisher.start()
    await asyncio.to_thread(ready.wait)
    stop, started = asyncio.Event(), asyncio.Event()
    seen = 0

    def show(summary: Summary) -> None:
        nonlocal seen
        seen = summary.messages + summary.dropped
        started.set()

    recording = asyncio.create_task(record(Broker(url=url), out, stop=stop, show=show))
    await started.wait()
    before = time.process_time()
    go.set()
    await asyncio.to_thread(publisher.join)
    while seen < count:
        last = seen
        await asyncio.sleep(SILENCE_S)
        if seen == last:
            break  # nothing more comes: the rest is lost
    spent = time.process_time() - before
    stop.set()
    return await recording, spent


def measure_rate(url: str, rate: int, seconds: float, *, payload: int, qos: int) -> float:
    """One line: what was published, what is in the file, what it cost; the rate recorded, 0 after a loss."""
    count = int(rate * seconds)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run.trace")
        summary, spent = asyncio.run(recorded(url, out, rate, count, payload=payload, qos=qos))
        found = list(read(out))
        numbers = [int.from_bytes(entry.payload[:8], "little") for entry in found]
        lost = count - len(set(numbers))
        took = found[-1].at_s - found[0].at_s if len(found) > 1 else 0.0
        achieved = len(found) / took if took else 0.0
        print(
            f"{rate:>7,}/s   recorded {len(found):,}, lost {lost:,} ({summary.dropped:,} in the recorder, {summary.reconnects} reconnects), "
            f"{achieved:,.0f}/s over {took:.1f} s, in order: {numbers == sorted(numbers)}, "
            f"{summary.file_bytes / max(1, len(found)):.0f} bytes a message, {spent / max(1, len(found)) * 1e6:.0f} us of processor time each",
            flush=True,
        )
    return 0.0 if lost else achieved


def measure_jitter(url: str, rate: int, seconds: float) -> None:
    """Replay at speed 1 and record it again: lateness at the sender, and of the arrivals against the schedule."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1.0 / rate, int(rate * seconds)))  # (n,) seconds

    async def run(path: Path, again: Path) -> str:
        stop, started, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

        def show(summary: Summary) -> None:
            started.set()
            if summary.messages >= len(times):
                done.set()

        recording = asyncio.create_task(record(Broker(url=url), again, stop=stop, show=show))
        await started.wait()
        played = await replay(read(path), Broker(url=url), stop=asyncio.Event())
        await done.wait()
        stop.set()
        await recording
        p50, p99 = played.jitter()
        return f"published p50 {p50:.2f} ms, p99 {p99:.2f} ms late"

    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder, "first.trace"), Path(folder, "second.trace")
        with Writer(path, Header(created_ms=0, source="benchmark")) as writer:
            for number, at in enumerate(times):
                writer.write(Record(float(at), 0, TOPIC.format(number % AGENTS), bytes(128), 1))
        told = asyncio.run(run(path, again))
        arrived = np.array([entry.at_s for entry in read(again)])  # (n,) seconds
        late = arrived - times
        late -= late.min()
        p50, p99 = np.percentile(late * 1e3, (50, 99))
        print(
            f"{rate:>7,}/s   {told}; received again p50 {p50:.2f} ms, p99 {p99:.2f} ms after the quickest", flush=True
        )


def main() -> None:
    """Print the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=COUNT, nargs="+", default=[1_000, 3_000, 6_000, 10_000])
    parser.add_argument("--replay-rates", type=COUNT, nargs="*", default=[50, 500])
    parser.add_argument("--seconds", type=limited(float, 0.1, 3_600.0), default=10.0)
    parser.add_argument("--payload", type=COUNT, default=120)
    parser.add_argument("--qos", type=int, choices=(0, 1), default=1)
    parser.add_argument("--patient", action="store_true", help="let mosquitto queue without limit for the recorder")
    options = parser.parse_args()
    settings = PATIENT if options.patient else ""
    print(
        f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; QoS {options.qos}, patient broker: {options.patient}"
    )
    best = 0.0
    for rate in options.rates:
        with mosquitto(settings) as url:
            best = max(best, measure_rate(url, rate, options.seconds, payload=options.payload, qos=options.qos))
    print(f"highest rate recorded without loss: {best:,.0f} messages/s")
    for rate in options.replay_rates:
        with mosquitto(settings) as url:
            measure_jitter(url, rate, options.seconds)


if __name__ == "__main__":
    main()
