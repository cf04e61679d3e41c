"""The commands of a page: which they are, which of them run, and a runner that types them in order.

`<!-- not run here: `COMMAND`: REASON; ... -->` leaves out the commands that begin so, up to the end of the section that
it stands in; under the title of the page that is the page. REASONS lists every reason that there is.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

# Why a command of a page is not run by tests/docs/test_commands.py, and what stands in for it.
REASONS: Final = {
    "needs root": "tests/deploy/test_systemd.py runs the units",
    "needs Docker": "`make compose-test` runs them on an engine, tests/deploy/test_compose.py reads the files",
    "needs an image of Raspberry Pi OS": "tests/fedhlm_fleet/flash makes one and flashes it",
    "needs another machine": "tests/fedhlm_fleet/flash/test_provision.py stands in for it",
    "needs texts that are not part of the project": "the model cards say which; tests of fedhlm_lab and fedhlm_zoo use few",
    "needs a server of a model": "tests/integration/test_server.py runs fleets with one of vLLM's schema",
    "needs llama.cpp": "tests/integration/test_gguf.py runs fleets on it where it is installed",
    "needs an environment of its own": "tests/test_flower.py and tests/deploy/test_kubeflow.py run what needs none",
    "needs torch": "tests/fedhlm_zoo runs them where `make models` has been",
    "takes minutes": "tests/integration/test_chaos.py runs a short one",
    "is this test": "",
    "shows the form": "the blocks below it are run",
    "needs a seed that fails": "tests/fedhlm_lab/sim/test_simulate_command.py makes one",
}

_MARK: Final = re.compile(r"`([^`]+)`: ([^;`]+?)(?=; `| -->)")
_PROGRAMS: Final = r"fedhlm|mkdir|make|pip|python|sudo|docker|cp|mosquitto|mosquitto_sub|systemctl|cat|git|mv|curl"
_TYPED: Final = re.compile(rf"    (?:[A-Z_]+=\S+ )*(?:{_PROGRAMS}) ")
_SERVES: Final = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:fedhlm +(?:edge|cloud|agent|record|console)|mosquitto|mosquitto_sub)\b"
)
_ENDS: Final = re.compile(r"--prompt|--duration")
_READY: Final = re.compile(r"serving cluster|verifying with|drafting with|open http")
_READY_S: Final = 90.0
_LIMIT_S: Final = 600.0


class Step(NamedTuple):
    """A command as it stands on a page, and why it is left out; empty where it is run."""

    command: str
    left_out: str

    @property
    def serves(self) -> bool:
        """Whether it goes on until it is stopped, and so has a terminal of its own."""
        return _SERVES.match(self.command) is not None and _ENDS.search(self.command) is None


def steps(page: str) -> Iterator[Step]:
    """Yield the commands of a page in order: `sh` blocks, lines with a prompt, and indented lines that name a program."""
    left_out: dict[int, dict[str, str]] = {}  # by the level of the heading that it stands under
    level = 1
    fence = ""
    lines = iter(page.splitlines())
    for line in lines:
        if line.startswith("<!-- not run here: "):
            left_out[level] = left_out.get(level, {}) | dict(_MARK.findall(line))
            assert left_out[level], line
        elif line.startswith("```"):
            fence = "" if fence else line.removeprefix("```") or "text"
        elif line.startswith("#") and not fence:
            level = len(line) - len(line.lstrip("#"))
            left_out = {above: marks for above, marks in left_out.items() if above < level}
        elif (fence == "sh" and line.strip()) or (not fence and (line.startswith("    $ ") or _TYPED.match(line))):
            command = line.strip().removeprefix("$ ")
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            while is_open(command):
                command += f"\n{next(lines).strip()}"
            marks = ((begins, why) for known in left_out.values() for begins, why in known.items())
            yield Step(command, next((why for begins, why in marks if command.startswith(begins)), ""))


def is_open(command: str) -> bool:
    """Whether a quotation goes on in the next line. Quotes in the comment behind a command do not count."""
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return True
    return False


class Terminals:
    """A folder in which commands are typed: those that end one after the other, servers each in a terminal of its own."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.environ = environ
        self._serving: list[tuple[str, subprocess.Popen[bytes], Path]] = []

    def type(self, command: str) -> str:
        """Run a command to its end and return what it printed; its exit status must be 0."""
        done = subprocess.run(
            ["bash", "-c", command if "| head" in command else f"set -o pipefail; {command}"], cwd=self.folder, env=self.environ, capture_output=True,
            text=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2_000:]}{done.stderr[-2_000:]}\n{self.told()}"
        return done.stdout + done.stderr

    def serve(self, command: str) -> None:
        """Start a command that goes on, and return once it says that it is ready."""
        told = self.folder / f".terminal-{len(self._serving)}"
        with told.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}" if "|" not in command and "FEDHLM_" not in command else command],
                cwd=self.folder, env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self._serving.append((command, process, told))
        if not re.search(r"fedhlm +(edge|cloud|agent|console)", command):
            time.sleep(2.0)
            assert process.poll() is None, f"{command}\n{told.read_text('utf-8')}"
            return
        end_s = time.monotonic() + _READY_S
        while not _READY.search(told.read_text("utf-8")):
            assert process.poll() is None, f"{command}\n{told.read_text('utf-8')}"
            assert time.monotonic() < end_s, f"{command}\n{told.read_text('utf-8')}"
            time.sleep(0.1)

    def told(self) -> str:
        """Return the end of what each server has printed."""
        return "\n".join(f"{command}\n{told.read_text('utf-8')[-1_000:]}" for command, _, told in self._serving)

    def close(self, beginning: str = "") -> None:
        """Interrupt the servers whose commands begin so, the last first, as Ctrl-C does; all end well."""
        for command, process, told in reversed(self._serving):
            if command.startswith(beginning) and process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(30.0)
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                assert "Traceback" not in told.read_text("utf-8"), f"{command}\n{told.read_text('utf-8')}"
        self._serving = [entry for entry in self._serving if entry[1].poll() is None]


@contextmanager
def terminals(folder: Path, environ: Mapping[str, str]) -> Iterator[Terminals]:
    """Terminals whose servers are stopped at the end."""
    opened = Terminals(folder, environ)
    try:
        yield opened
    finally:
        opened.close()
