"""A plain installation from the wheel, used in an empty folder: the demo and every part run, the rest says what it lacks."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import installed
from tests.brokers import free_port, until_listening

WITHIN_S = 120.0


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`fedhlm` of a plain installation in a folder, with `words` after it."""
    programs = installed.programs()
    return subprocess.run(
        [programs / "fedhlm", *words],
        cwd=folder,
        env=installed.environ(programs, HOME=str(folder)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )


@contextmanager
def running(folder: Path, *words: str) -> Iterator[None]:
    """A part while a test asks; it must live until then, and end well."""
    programs = installed.programs()
    environ = installed.environ(programs, HOME=str(folder))
    with subprocess.Popen([programs / "fedhlm", *words], cwd=folder, env=environ, stderr=subprocess.PIPE) as part:
        try:
            yield
            assert part.poll() is None
        finally:
            part.terminate()
        part.communicate(timeout=WITHIN_S)
    assert part.returncode == 0


@pytest.mark.slow
def test_the_demo_runs_in_an_empty_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "demo", "--duration", "3", "--tokens", "16", "--json", "result.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads((tmp_path / "result.json").read_bytes())
    assert report["requests"] > 0
    assert [column["failed"] for column in (report, *report["comparisons"])] == [0] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "nothing else is left behind"


@pytest.mark.slow
def test_a_fleet_of_one_agent_answers(tmp_path: Path) -> None:
    port = free_port()
    url = ["--broker.url", f"mqtt://127.0.0.1:{port}"]
    with running(tmp_path, "edge", "--edge.embedded_port", str(port)):
        asyncio.run(asyncio.wait_for(until_listening(port), WITHIN_S))
        with running(tmp_path, "cloud", *url):
            done = run(tmp_path, "agent", *url, "--preset", "exact", "--prompt", "Oil prices rise")
            with running(tmp_path, "agent", *url, "--agent.id", "porch"):
                asked = run(tmp_path, "ask", "porch", "Oil prices rise", "--wait", "60", "--json", *url)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["text"]
    assert len(answer["ids"]) == len(answer["sources"]) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("pki init pki", "operator"),
        ("models train runs", "models"),
        ("models export model out", "models"),
        ("models quantise model out --mode int8-dynamic", "models"),
        ("cloud --federation.assign_s 60", "cloud"),
    ],
)
def test_what_a_plain_installation_lacks_is_one_line_that_names_the_extra(
    words: str, extra: str, tmp_path: Path
) -> None:
    done = run(tmp_path, *words.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fedhlm: '")
    assert done.stderr.endswith(f"' is not installed: pip install 'fedhlm[{extra}]'\n")
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_holds_what_runs_and_nothing_else() -> None:
    listed = subprocess.run(
        [os.fspath(installed.programs() / "python"), "-m", "zipfile", "-l", str(installed.wheel())],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = {line.split()[0].partition("/")[0] for line in listed.splitlines()[1:]}
    packages = {path.parent.name for path in installed.ROOT.glob("*/__init__.py")} - {"tests"}
    assert {name for name in names if not name.endswith(".dist-info")} == packages
    for path in ("fedhlm/py.typed", "fedhlm/presets/exact.toml", "fedhlm_zoo/artefacts/slm/model.onnx"):
        assert path in listed
