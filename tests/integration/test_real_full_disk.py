"""A file system that is really full: parts start, answer and end on it, and keep what they had learnt before.

The file system is a small tmpfs, which takes root to mount.
"""

import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_verifier.service import FEDERATION_FILE
from edge_agent.core import LEARNER_FILE
from edge_broker.embedded import EmbeddedBroker
from edge_broker.service import memory_file
from fedhlm.bus.mqtt import MqttBus
from fedhlm.errors import TraceError
from fedhlm.process import state
from fedhlm_traces.file import Header, Record, Writer, read
from tests.integration.live import live

SIZE_BYTES = 512 * 1024


class Disk:
    """A mounted file system of SIZE_BYTES."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            size = 65_536
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2
        assert os.statvfs(self.path).f_bavail == 0

    def clear(self) -> None:
        """Make room again."""
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES},mode=0700", "tmpfs", str(place)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
async def test_all_parts_start_answer_and_end_on_a_full_disk_and_keep_what_they_had(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    flags: dict[str, object] = {
        "preset": "budget",
        "agent.state": disk.path / "agent",
        "edge.state": disk.path / "edge",
        "cloud.state": disk.path / "cloud",
        "generation.learning.round_tokens": 1,  # something to keep after every text
        "generation.learning.round_s": 0.001,
        "federation.round_s": 0.1,
    }
    kept = {"agent": LEARNER_FILE, "edge": memory_file("home"), "cloud": FEDERATION_FILE}
    async with EmbeddedBroker() as broker, live(broker.url, flags=flags) as system:
        await system.ask("Oil prices rise", max_tokens=8)
        for name in ("porch", "edge", "cloud"):
            await system.stop(name)
        before = {part: (disk.path / part / name).read_bytes() for part, name in kept.items()}
        disk.fill()
        with caplog.at_level(logging.WARNING):
            system.presence.clear()
            for name in ("cloud", "edge", "porch"):
                system.start(name)
            await system.ready("porch")
            system.heard.clear()
            answers = [await system.ask("Champions win again", max_tokens=8) for _ in range(3)]
            ends = [output.request for output in system.heard if output.finish is not None]
            for name in ("porch", "edge", "cloud"):
                await system.stop(name)
        assert [answer.finish for answer in answers] == ["length"] * 3
        assert ends == [answer.request for answer in answers], "each ends once"
        said = [record.getMessage() for record in caplog.records]
        assert any("No space left" in line and LEARNER_FILE in line for line in said)
        assert {part: (disk.path / part / name).read_bytes() for part, name in kept.items()} == before
        assert not list(disk.path.glob("*/*.new")), "nothing half written is left"

        # With room again, what is learnt is kept when the parts are asked to end.
        disk.clear()
        system.presence.clear()
        for name in ("cloud", "edge", "porch"):
            system.start(name)
        await system.ready("porch")
        await system.ask("Rain will fall", max_tokens=8)
        for name in ("porch", "edge", "cloud"):
            await system.stop(name)
        assert (disk.path / "agent" / LEARNER_FILE).read_bytes() != before["agent"]
        assert state.load(disk.path / "agent", LEARNER_FILE) is not None


@pytest.mark.slow
@pytest.mark.parametrize("role", ["agent", "edge", "cloud"])
def test_a_process_starts_on_a_full_disk_and_ends_cleanly_at_sigterm(role: str, disk: Disk) -> None:
    disk.fill()
    command = [sys.executable, "-m", "fedhlm_fleet.cli", role, f"--{role}.state", str(disk.path)]
    with subprocess.Popen([*command, *_place(role)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if ("serving cluster" if role == "edge" else "trying again") in line:
                break
        try:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0, lines
        finally:
            process.kill()
    assert any("state cannot be saved now" in line for line in lines)


def _place(role: str) -> list[str]:
    port = str(random.randrange(20_000, 60_000))
    return ["--edge.embedded_port", port] if role == "edge" else ["--broker.url", f"mqtt://127.0.0.1:{port}"]


def test_a_recording_on_a_full_disk_ends_with_one_error_and_stays_readable(disk: Disk) -> None:
    path = disk.path / "run.trace"
    noise = random.Random(1)

    def record() -> None:
        with Writer(path, Header(created_ms=0, source="test"), flush_bytes=16_384) as writer:
            while True:
                writer.write(Record(0.0, 0, "fedhlm/x", noise.randbytes(4_096)))

    with pytest.raises(TraceError, match=r"run\.trace: cannot write after \d+ bytes, which stay readable: No space"):
        record()
    assert sum(1 for _ in read(path)) > 50
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("begins_full", [True, False])
async def test_a_recorder_on_a_full_disk_says_so_once_and_ends_with_status_2(disk: Disk, begins_full: bool) -> None:
    path = disk.path / "run.trace"
    noise = random.Random(1)
    if begins_full:
        disk.fill()
    async with EmbeddedBroker() as broker, MqttBus(broker.url, client_id="talker") as talker:
        command = [sys.executable, "-m", "fedhlm_fleet.cli", "record", "--broker", broker.url, "--out", str(path)]
        process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            async with asyncio.timeout(60.0):
                ending = asyncio.ensure_future(process.communicate())
                while not ending.done():
                    await talker.publish("fedhlm/1/x", noise.randbytes(8_192), qos=0)
                    await asyncio.sleep(0.005)
                _, told = ending.result()
        finally:
            if process.returncode is None:
                process.kill()
    lines = [line for line in told.decode().splitlines() if "No space left" in line]
    assert process.returncode == 2, told
    assert len(lines) == 1, told
    assert lines[0].startswith(f"fedhlm: {path}")
    assert "Traceback" not in told.decode()
    if not begins_full:
        assert sum(1 for _ in read(path)) > 10
