"""The commands of a page, run in order as they stand there, in an empty folder, with the program as pip installs it.

`<!-- not run here: `COMMAND`: REASON; ... -->` above a block leaves out the commands that begin so.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import installed

ROOT: Final = Path(__file__).parents[2]
# What must be there after the page's commands.
MADE: Final = {
    "docs/security.md": [
        "pki/ca.crt",
        "broker-home/mosquitto.conf",
        "broker-home/broker.key",
        "broker-home/acl",
    ],
    "docs/devices.md": ["pki/ca.crt", "mosquitto/mosquitto.conf", "mosquitto/broker.key", "mosquitto/acl"],
}
_LEFT_OUT: Final = re.compile(r"`([^`]+)`: [^;`]+")
_PROGRAMS: Final = ("fedhlm ", "pip ", "sudo ", "cat ", "mosquitto ")


def commands(page: str) -> Iterator[tuple[str, bool]]:
    """Each command of a page's `sh` blocks and lines with a prompt, and whether it is to be run."""
    left_out: tuple[str, ...] = ()
    fenced = False
    lines = iter(page.splitlines())
    for line in lines:
        if line.startswith("<!-- not run here: "):
            left_out = tuple(_LEFT_OUT.findall(line))
            assert left_out, line
        elif line.startswith("```"):
            fenced = line == "```sh"
        elif line.startswith("#"):
            left_out = ()
        elif line.startswith("    $ ") or (fenced and line.strip()):
            command = line.strip().removeprefix("$ ")
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            yield command, not command.startswith(left_out or ("\0",))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MADE))
def test_the_commands_of_a_page_work_in_its_order(name: str, tmp_path: Path) -> None:
    found = list(commands((ROOT / name).read_text("utf-8")))
    assert any(runs for _, runs in found)
    (tmp_path / "cards.csv").write_text("agent\nporch\n", "utf-8")  # the page shows it
    programs = installed.programs("operator")
    for command, runs in found:
        assert command.startswith(_PROGRAMS), command
        if not runs or command.startswith("pip "):  # done, from the wheel of this tree
            continue
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=installed.environ(programs), capture_output=True, text=True,
            timeout=120, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert [path for path in MADE[name] if not (tmp_path / path).exists()] == []


def test_what_is_left_out_is_named_with_a_reason() -> None:
    page = "<!-- not run here: `b`: no time -->\n\n    $ a 1\n    $ b 2 \\\n        3\n\n# Next\n    $ b 4\n"
    assert list(commands(page)) == [("a 1", True), ("b 2 3", False), ("b 4", True)]
