"""However a command ends, it says so in one line: output that cannot be written, ports that are taken, bytes that are no text."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.processes import PROGRAM, obey_interrupts, one_line, run

NOBODY = "mqtt://127.0.0.1:1"
HALF = os.fsdecode("café".encode()[:-1])


@pytest.mark.parametrize("words", [("presets",), ("config", "explain"), ("--help",)], ids=" ".join)
def test_a_full_disk_under_the_output_is_one_line(words: Sequence[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(*words, stdout=full.fileno())
    assert one_line(done, 1) == "fedhlm: standard output must be writable (got No space left on device)"


def test_a_closed_output_is_no_error() -> None:
    words = " ".join(PROGRAM)
    done = subprocess.run(["sh", "-c", f"{words} presets >&-"], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in one_line(run("edge", "--edge.embedded_port", port), 2)
        metrics = run("edge", "--edge.embedded_port", "0", "--telemetry.metrics_port", port)
        assert f"telemetry.metrics_port must be a port that is free on 127.0.0.1 (got {port}" in one_line(metrics, 2)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("agent", "--prompt", HALF), "--prompt"),
        (("ask", "porch", HALF), "text"),
        (("ask", HALF, "x"), "agent"),
        (("agent", "--config", HALF), "file"),
        (("agent", "--cluster.name", HALF), "cluster.name"),
        (("config", "explain", HALF), "is not a known key"),
        ((HALF,), "is not a command of fedhlm"),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else given,
)
def test_bytes_that_are_no_text_are_one_line(words: Sequence[str], key: str) -> None:
    line = one_line(run(*words), 2)
    assert key in line
    assert "\\udcc3" in line or "\\xc3" in line


@pytest.mark.parametrize(
    ("word", "meant"),
    [("--promt", "--prompt"), ("--confg", "--config"), ("--prset", "--preset"), ("--prompts", "--prompt")],
)
def test_a_misspelt_option_gets_the_nearest(word: str, meant: str) -> None:
    line = one_line(run("agent", word, "Oil prices rise"), 2)
    assert line == f"fedhlm: {word} is not an option of this command: did you mean {meant}?"


@pytest.mark.parametrize(
    "words",
    [
        ("agent", "--prompt", "x", "--broker.url", NOBODY, "--broker.connect_timeout_s", "60"),
        ("ask", "porch", "x", "--broker.url", NOBODY, "--wait", "60"),
        ("simulate", "--seeds", "0..9999", "--jobs", "1"),
        ("simulate", "--seeds", "0..9999", "--jobs", "2"),
    ],
    ids=lambda words: " ".join((words[0], *words[-2:])),
)
def test_an_interrupt_ends_with_130_and_without_a_traceback(words: Sequence[str], tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [*PROGRAM, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=obey_interrupts,  # noqa: PLW1509 - no threads here
    ) as process:  # fmt: skip
        time.sleep(6.0)  # into the work, wherever that is
        process.send_signal(signal.SIGINT)
        told, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said + told
    assert "seed " not in told, "an interrupt is no failure of a seed"


COMPLETIONS = """
source ~/.bashrc
typed() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _fedhlm; echo "${COMPREPLY[@]}"; }
complete -p fedhlm
typed fedhlm a
typed fedhlm trace s
typed fedhlm ask porch --se
typed fedhlm demo --du
"""


def test_one_command_installs_completion_for_bash(tmp_path: Path) -> None:
    for _ in range(2):  # twice is once
        done = run("completion", "--shell", "bash", HOME=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
    script = ".local/share/bash-completion/completions/fedhlm"
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert made == [".bashrc", script]
    lines = (tmp_path / ".bashrc").read_text("utf-8").splitlines()
    assert sum(script in line for line in lines) == 1
    told = subprocess.run(
        ["bash", "-c", COMPLETIONS],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.splitlines() == ["complete -F _fedhlm fedhlm", "ask agent", "show stats", "--seed", "--duration"]


def test_what_is_to_be_removed_is_what_is_installed() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "operations.md").read_text("utf-8").partition("## Uninstall")[2].partition("\n## ")[0]
    script = (root / "fedhlm_fleet" / "flash" / "install.sh").read_text("utf-8")
    unit = (root / "deploy" / "systemd" / "fedhlm-agent.service").read_text("utf-8")
    for place in ("/opt/fedhlm", "/opt/fedhlm-", "/etc/fedhlm", "/etc/systemd/system"):
        assert place in script
        assert f"`{place}" in page, place
    assert "DynamicUser=yes" in unit
    assert "StateDirectory=fedhlm-agent" in unit
    assert "`/var/lib/private/fedhlm-agent`" in page  # where systemd puts the state of a dynamic user
    assert "`~/.local/share/bash-completion/completions/fedhlm`" in page
