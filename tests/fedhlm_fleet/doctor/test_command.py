"""`fedhlm doctor` as its users run it: a page of 80 columns, one JSON object, and an exit code."""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm_fleet.doctor.report import SCHEMA
from tests.brokers import MOSQUITTO, Mosquitto, free_port
from tests.fedhlm.process.test_notify import Manager

WIDTH = 80


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedhlm_fleet.cli", "doctor", *words],
        env={**os.environ, "COLUMNS": str(WIDTH), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("role", ["agent", "edge", "cloud"])
def test_a_page_fits_80_columns_and_has_no_colours_in_a_pipe(role: str) -> None:
    port = str(free_port())
    place = ("--edge.embedded_port", port) if role == "edge" else ("--broker.url", f"mqtt://127.0.0.1:{port}")
    done = run(role, *place)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(line == line.rstrip() for line in lines)
    # An edge starts its own broker, so that nothing has failed where it does not run yet.
    assert done.returncode == (0 if role == "edge" else 1)
    assert (f"nobody listens on mqtt://127.0.0.1:{port}" in " ".join(done.stdout.split())) is (role != "edge")


async def test_json_says_the_same_in_its_schema() -> None:
    async with EmbeddedBroker() as broker:
        done = await asyncio.to_thread(run, "cloud", "--json", "--broker.url", broker.url)
    report = json.loads(done.stdout)
    assert report.keys() == {"schema", "role", "name", "failed", "seconds", "counts", "findings"}
    assert (report["schema"], report["role"], report["name"]) == (SCHEMA, "cloud", "cloud")
    assert done.returncode == report["failed"] == any(f["level"] == "fail" for f in report["findings"])
    for level, count in report["counts"].items():
        assert count == sum(f["level"] == level for f in report["findings"])
    assert sum(report["counts"].values()) == len(report["findings"])
    names = [f["name"] for f in report["findings"]]
    assert len(set(names)) == len(names)
    for finding in report["findings"]:
        assert finding.keys() == {"name", "level", "found", "advice", "seconds"}
        assert finding["level"] in {"ok", "warn", "fail", "skip"}
        assert finding["found"]
        assert bool(finding["advice"]) is (finding["level"] in {"warn", "fail"})
    assert report["seconds"] < 20.0


def test_a_wrong_file_is_a_finding_and_the_machine_is_examined_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("[broker]\nprot = 5\n")
    done = run("agent", "--config", str(file), "--json")
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert found["configuration"]["level"] == "fail"
    assert "broker.prot" in found["configuration"]["found"]
    assert found["broker host"]["level"] == "skip"
    assert "'configuration' failed" in found["broker host"]["found"]
    assert found["libraries"]["level"] == "ok"


def test_a_secret_of_the_environment_is_not_shown() -> None:
    secret = "never-to-be-seen"
    url = f"mqtt://porch:{secret}@127.0.0.1:{free_port()}"
    done = run("agent", FEDHLM_BROKER__URL=url, FEDHLM_EDGE__UPSTREAM__PASSWORD=secret)
    assert secret not in done.stdout + done.stderr


@pytest.mark.slow
async def test_a_fleet_that_works_is_in_order_and_goes_on_working(tmp_path: Path) -> None:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    roles = ("cloud", "edge", "agent")
    async with Mosquitto() as broker, AsyncExitStack() as stack:
        managers = []
        for role in roles:
            manager = Manager(str(tmp_path / role))
            stack.callback(manager.close)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fedhlm_fleet.cli", role, "--broker.url", broker.url),
                env={**os.environ, "NOTIFY_SOCKET": manager.address, "FEDHLM_TELEMETRY__LOG_LEVEL": "ERROR"},
            )
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
            await asyncio.to_thread(manager.hear_until, lambda m: "READY" in m)
            managers.append(manager)
        for role in roles:
            place = ("--broker.url", broker.url, f"--{role}.state", str(tmp_path / f"{role}-state"))
            done = await asyncio.to_thread(run, role, "--json", *place)
            report = json.loads(done.stdout)
            found = {f["name"]: f for f in report["findings"]}
            failed = {name for name, finding in found.items() if finding["level"] == "fail"}
            assert failed <= {"decode speed"}, report  # a machine under load is slow, and the doctor says so
            assert done.returncode == bool(failed)
            assert found["agreement"]["level"] == "ok", found["agreement"]
            assert found["state folder"]["level"] == "ok"
        for manager in managers:
            assert not any("no link" in m.get("STATUS", "") for m in manager.waiting()), "a part lost its link"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("agnet",), "did you mean 'agent'?"),
        (("agent", "--broker.prot", "5"), "broker.prot is not a known key: did you mean broker.protocol?"),
        (("--broker.url",), "must be given a value"),
        (("agent", "edge"), "argument must be --key value"),
    ],
)
def test_what_was_typed_wrongly_is_one_line(words: tuple[str, ...], reason: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
