"""Each part as a process of its own: it says what is wrong in one line, and a signal stops it cleanly."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.brokers import MOSQUITTO, Mosquitto, free_port

ROLES = ["agent", "edge", "cloud"]
COMMAND = [sys.executable, "-m", "fedhlm_fleet.cli"]


@contextmanager
def running(*arguments: str, until: str) -> Iterator["subprocess.Popen[str]"]:
    """A part whose log has shown `until`."""
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if until in line:
                break
        else:
            raise AssertionError(f"{arguments} ended before {until!r}")
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_without_a_broker_a_part_keeps_trying_and_stops_on_a_signal(role: str) -> None:
    port = str(free_port())
    place = ["--edge.embedded_port", port] if role == "edge" else ["--broker.url", f"mqtt://127.0.0.1:{port}"]
    words = "serving cluster" if role == "edge" else "trying again"
    with running(role, *place, until=words) as process:
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


@pytest.mark.slow
def test_one_prompt_on_a_dead_broker_is_one_error() -> None:
    url = f"mqtt://127.0.0.1:{free_port()}"
    env = {**os.environ, "FEDHLM_BROKER__CONNECT_TIMEOUT_S": "1", "FEDHLM_TELEMETRY__LOG_LEVEL": "ERROR"}
    command = [*COMMAND, "agent", "--broker.url", url, "--prompt", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"broker {url} not reached within 1 s" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
async def test_a_wrong_password_ends_with_the_brokers_no(role: str) -> None:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    async with Mosquitto(users={"porch": "right"}) as broker:
        env = {
            **os.environ,
            "FEDHLM_BROKER__USERNAME": "porch",
            "FEDHLM_BROKER__PASSWORD": "wrong-secret",
            "FEDHLM_TELEMETRY__LOG_LEVEL": "ERROR",
        }
        command = [*COMMAND, role, "--broker.url", broker.url]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=60, check=False, env=env
        )
    assert done.returncode == 2
    assert "not authorised" in done.stderr
    assert "wrong-secret" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
