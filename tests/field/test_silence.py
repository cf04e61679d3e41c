"""A part speaks to its broker and to nobody else, asks for no name but the broker's, and writes where it was told to."""

import ast
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from fedhlm import NO_TELEMETRY
from tests.brokers import free_port
from tests.strace import STRACE, Outside, outside, traced

ROOT: Final = Path(__file__).parents[2]
# The runtime of the models spoke from its ninth second on.
ALIVE_S: Final = 60.0 if os.environ.get("CI") == "true" else 30.0
READY_S: Final = 120.0
REPORTING: Final = {"datasets", "huggingface_hub", "onnxruntime", "optimum", "tokenizers", "transformers"}
MEDDLER = """
import pathlib, socket
def attempt(call, *arguments):
    try: call(*arguments)
    except OSError: pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
    attempt(line.connect, ("192.0.2.1", 443))
    attempt(line.sendto, b"x", ("192.0.2.2", 53))
with socket.socket(socket.AF_UNIX) as line:
    attempt(line.connect, "/run/a-name-service")
folder = pathlib.Path.home() / ".cache" / "maker"
folder.mkdir(parents=True)
(folder / "device").write_text("7")
"""


def environ(top: Path, name: str, **more: str) -> dict[str, str]:
    """A user who has nothing yet, and none of the names that would silence a library."""
    kept = {key: value for key, value in os.environ.items() if key not in NO_TELEMETRY and not key.startswith("XDG_")}
    home = top / f"home-{name}"
    home.mkdir()
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def left_in(top: Path, name: str) -> list[Path]:
    return sorted((top / f"home-{name}").rglob("*"))


@pytest.fixture(autouse=True)
def strace_is_there() -> None:
    if STRACE is None:
        pytest.skip("strace is not installed")


def ask(url: str) -> str:
    settings = {"FEDHLM_BROKER__URL": url, "FEDHLM_CLUSTER__NAME": "home", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fedhlm_fleet.cli", "ask", "porch", "Oil prices rise", "--wait", str(READY_S)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=READY_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(ALIVE_S + 2 * READY_S)
def test_a_fleet_that_works_speaks_to_its_broker_only(tmp_path: Path) -> None:
    port = free_port()
    url = f"mqtt://127.0.0.1:{port}"
    flags = {
        "edge": ["--cluster.name", "home", "--edge.embedded_port", str(port)],
        "cloud": ["--broker.url", url],
        "agent": ["--broker.url", url, "--agent.id", "porch"],
    }
    begun_s = time.monotonic()
    with ExitStack() as stack:
        parts: dict[str, subprocess.Popen[bytes]] = {}
        for role, given in flags.items():
            state = tmp_path / f"state-{role}"
            command = [sys.executable, "-m", "fedhlm_fleet.cli", role, *given, f"--{role}.state", str(state)]
            log = stack.enter_context((tmp_path / f"{role}.log").open("wb"))
            part = subprocess.Popen(
                traced(tmp_path / f"{role}.strace", command), env=environ(tmp_path, role), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            parts[role] = part
            stack.callback(end, part)
        assert len(ask(url)) > 40
        time.sleep(max(0.0, ALIVE_S - (time.monotonic() - begun_s)))
        assert {role: part.poll() for role, part in parts.items()} == dict.fromkeys(flags)
        for part in parts.values():
            os.killpg(part.pid, signal.SIGTERM)
        assert {role: part.wait(READY_S) for role, part in parts.items()} == dict.fromkeys(flags, 0)
    for role in flags:
        found = outside(tmp_path / f"{role}.strace")
        # The broker has no name here, so that a single question to a name service would be one too many.
        assert found.spoken == {f"127.0.0.1:{port}"}, role
        assert not strange(found, tmp_path / f"state-{role}"), role
        assert left_in(tmp_path, role) == []


def end(part: "subprocess.Popen[bytes]") -> None:
    if part.poll() is None:
        os.killpg(part.pid, signal.SIGKILL)
        part.wait()


def strange(found: Outside, state: Path) -> set[str]:
    """What was written outside the folder for state, devices apart; names without a folder are relative to one."""
    return {path for path in found.written if not path.startswith((str(state), "/dev/"))}


def test_the_look_outside_sees_a_meddler(tmp_path: Path) -> None:
    log = tmp_path / "log"
    subprocess.run(traced(log, [sys.executable, "-c", MEDDLER]), env=environ(tmp_path, "meddler"), check=True)
    found = outside(log)
    assert {"192.0.2.1:443", "192.0.2.2:53", "unix:/run/a-name-service"} <= found.spoken
    assert any(path.endswith(".cache/maker/device") for path in strange(found, tmp_path / "state"))
    assert left_in(tmp_path, "meddler")


@pytest.mark.parametrize("package", ["fedhlm", "fedhlm_zoo"])
def test_a_package_silences_libraries_when_it_is_imported(package: str, tmp_path: Path) -> None:
    code = f"import os, {package}; print([os.environ.get(name) for name in {sorted(NO_TELEMETRY)}])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ(tmp_path, package), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == str([NO_TELEMETRY[name] for name in sorted(NO_TELEMETRY)]).split()


def test_whatever_reports_is_imported_after_the_silence() -> None:
    # In `fedhlm` the package itself comes first, in `fedhlm_zoo` its __init__ imports it; the other rooms wait for a function.
    for folder in sorted(path.parent for path in ROOT.glob("*/__init__.py")):
        if folder.name in ("fedhlm", "fedhlm_zoo"):
            continue
        for path in folder.rglob("*.py"):
            for node in ast.parse(path.read_text("utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not REPORTING & {name.partition(".")[0] for name in names}, path
