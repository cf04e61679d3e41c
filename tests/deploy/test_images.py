"""What an image runs, run with the packages that its Dockerfile copies and no other of ours: a lacking one is noticed."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
OURS: Final = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
NOBODY: Final = ("--broker.url", "mqtt://127.0.0.1:1", "--broker.connect_timeout_s", "1")
# Imports of the packages named first fail, as they do where these are not installed.
RUN: Final = """
import runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def copied(image: str) -> set[str]:
    """Our packages in an image."""
    text = (ROOT / "deploy" / "docker" / f"{image}.Dockerfile").read_text("utf-8")
    return {line.split()[1].partition("/")[0] for line in re.findall(r"^COPY (?!--).*$", text, re.MULTILINE)} & set(
        OURS
    )


def run(image: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    absent = ",".join(sorted(set(OURS) - copied(image)))
    return subprocess.run(
        [sys.executable, "-c", RUN, absent, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )  # fmt: skip


def test_an_absent_package_is_noticed() -> None:
    assert copied("init") == {"fedhlm", "fedhlm_fleet"}
    assert "No module named edge_broker" in run("init", "edge_broker").stderr


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "certificates"])
def test_the_init_image_makes_what_the_fleet_needs(plain: bool, tmp_path: Path) -> None:
    for folder in ("brokers/home", "cloud-broker", "cloud", "edges/home", "agents/home/porch", "clients/home/ask-home"):
        (tmp_path / "parts" / folder).mkdir(parents=True)
    users = (f"--part-user={os.getuid()}", f"--broker-user={os.getuid()}")
    given = ("--pki", str(tmp_path / "pki"), "--parts", str(tmp_path / "parts"), *users)
    done = run("init", "fedhlm_fleet.container.init", *given, *(["--plain"] if plain else []))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "parts/brokers/home/mosquitto.conf").is_file()
    if plain:
        return
    for words in (("list",), ("revoke", "porch"), ("issue", "porch", "--role", "agent", "--cluster", "home")):
        done = run("init", "fedhlm_fleet.cli", "pki", *words, "--pki", str(tmp_path / "pki"))
        assert (done.returncode, done.stderr) == (0, ""), words


@pytest.mark.parametrize(
    ("image", "words", "status"),
    [
        ("init", ("fedhlm_fleet.cli", "ask", "porch", "x", "--wait", "1"), 1),
        ("init", ("fedhlm_fleet.cli", "status"), 2),
        ("agent", ("fedhlm_fleet.cli", "agent", "--prompt", "x", "--preset", "exact"), 2),
        ("agent", ("fedhlm_fleet.cli", "console", "--listen", "127.0.0.1:0"), 2),
    ],
    ids=lambda given: given[1] if isinstance(given, tuple) else "",
)
def test_a_command_of_an_image_reaches_for_its_broker(image: str, words: tuple[str, ...], status: int) -> None:
    done = run(image, *words, *NOBODY)
    assert "127.0.0.1:1 not reached within 1 s" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == status


@pytest.mark.parametrize("part", ["agent", "edge", "cloud"])
def test_a_part_starts_from_what_its_image_holds(part: str) -> None:
    absent = ",".join(sorted(set(OURS) - copied(part)))
    command = [sys.executable, "-c", RUN, absent, "fedhlm_fleet.cli", part, *NOBODY[:2]]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        try:
            said = ""
            for line in process.stderr:
                said += line
                if "trying again" in line or "not reached" in line or "Traceback" in line:
                    break
            assert "Traceback" not in said, said + process.stderr.read()
            assert "127.0.0.1:1" in said
        finally:
            process.terminate()
            process.wait(30)
