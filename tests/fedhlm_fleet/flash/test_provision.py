"""Machines over ssh: decisions on what they are, and the whole way with an ssh that runs its command here, under another root."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedhlm.errors import ConfigError
from fedhlm_fleet.flash import provision
from fedhlm_fleet.flash.bundle import PYTHONS
from fedhlm_fleet.flash.plan import FlashError
from fedhlm_fleet.flash.provision import Host
from tests.fedhlm_fleet.flash import cards

PROGRAM = Path(sys.executable).with_name("fedhlm")
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"

# Stands for ssh and the machine behind it: takes ssh's options, runs the last word in a shell with a root and programs of its own.
SSH = """#!/bin/sh
printf '%s\\n' "$*" >>"{0}/asked"
while [ "$1" != -- ]; do shift; done
[ "$2" != unreachable ] || {{ echo "ssh: connect to host unreachable: No route to host" >&2; exit 255; }}
cd "{0}/home"
exec env -i PATH="{0}/bin:$PATH" HOME="{0}/home" FEDHLM_ROOT="{0}/root" sh -c "$3"
"""
PROGRAMS = {
    "sudo": '#!/bin/sh\n[ "$1" = -n ] && shift\nexec "$@"\n',
    "id": "#!/bin/sh\necho 1000\n",
    "systemctl": "#!/bin/sh\necho systemd 252\n",
    "uname": "#!/bin/sh\necho {machine}\n",
}


def host(**given: str) -> Host:
    found = {
        "machine": "aarch64",
        "python": "3.11",
        "glibc": "2.36",
        "system": "Debian",
        "systemd": "252",
        "sudo": "yes",
    }
    return Host(**{**found, "installed": "", **given})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": "armv7l"}, "64-bit"),
        ({"glibc": "2.27"}, "2.28 or newer"),
        ({"glibc": ""}, "another C library"),
        ({"systemd": "245"}, "247 or newer"),
        ({"systemd": ""}, "got none"),
        ({"sudo": "no"}, "sudo without a password"),
    ],
)
def test_a_machine_that_cannot_run_it_is_refused_with_the_reason(change: dict[str, str], said: str) -> None:
    assert provision.obstacle(host()) is None
    assert said in str(provision.obstacle(host(**change)))


def test_jetson_s_ubuntu_needs_an_interpreter_and_takes_one() -> None:
    jetson = host(system="Ubuntu 22.04.4 LTS", python="3.10", glibc="2.35", systemd="249")
    assert provision.obstacle(jetson) is None
    with pytest.raises(FlashError, match=r"Ubuntu 22.04.4 LTS has Python 3.10.*--interpreter"):
        provision.python_for(jetson, wanted=None, interpreter=False)
    assert provision.python_for(jetson, wanted="3.11", interpreter=True) == "3.11"
    with pytest.raises(ConfigError, match="--python"):
        provision.python_for(jetson, wanted=None, interpreter=True)


@pytest.mark.parametrize("python", PYTHONS)
def test_a_new_enough_machine_uses_its_own(python: str) -> None:
    assert provision.python_for(host(python=python), wanted=None, interpreter=False) == python
    with pytest.raises(FlashError, match="3.14 is needed"):
        provision.python_for(host(python=python), wanted="3.14", interpreter=False)


def test_what_is_no_linux_is_told() -> None:
    with pytest.raises(FlashError, match="did not say its machine"):
        Host.parse("Windows_NT")


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "", "a b"])
def test_a_host_is_never_an_option(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ssh").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="HOST must be"):
        provision.over_ssh(name)


class Machine:
    """A machine behind a stand-in for ssh."""

    def __init__(self, folder: Path, machine: str) -> None:
        self.folder = folder
        for name in ("bin", "home", "root", "desk"):
            (folder / name).mkdir()
        self.write("desk/ssh", SSH.format(folder))
        for name, text in PROGRAMS.items():
            self.write(f"bin/{name}", text.format(machine=machine))
        self.wheels = cards.wheels(folder / "wheels")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def provision(self, *arguments: str | Path, name: str = "jet", **given: Any) -> subprocess.CompletedProcess[str]:
        values = {"agent": "porch", "cluster": "home", "broker": "mqtt://edge", "wheels": self.wheels, **given}
        flags = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
        command: list[str | Path] = [PROGRAM, "provision", "ssh", name, *flags, *arguments]
        environ = {**os.environ, "PATH": f"{self.folder}/desk:{os.environ['PATH']}"}
        return subprocess.run(
            command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    if OWN not in PYTHONS:
        pytest.skip(f"no bundle is made for Python {OWN}")
    return Machine(tmp_path, platform.machine() if platform.machine() in provision.MACHINES else "x86_64")


def test_a_machine_is_asked_planned_installed_and_left_alone(machine: Machine) -> None:
    planned = machine.provision("--dry-run")
    assert planned.returncode == 0, planned
    assert "nothing was sent" in planned.stdout
    assert list((machine.folder / "root").iterdir()) == []

    done = machine.provision()
    assert done.returncode == 0, done
    program = machine.folder / "root/opt/fedhlm/bin/fedhlm"
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "1.0\n"
    assert (machine.folder / "root/etc/fedhlm/agent.toml").stat().st_mode & 0o777 == 0o600
    assert not (machine.folder / "home" / provision._UNPACKED).exists()

    asked = len((machine.folder / "asked").read_text().splitlines())
    again = machine.provision()
    assert again.returncode == 0, again
    assert again.stdout.endswith("nothing changed\n")
    lines = (machine.folder / "asked").read_text().splitlines()
    assert all("-o BatchMode=yes" in line for line in lines if line.startswith("-o"))
    # One connection that asks, none that sends.
    assert "tar -xf" not in "\n".join(lines[asked:])

    changed = machine.provision(broker="mqtt://elsewhere")
    assert "is started" in changed.stdout
    assert 'url = "mqtt://elsewhere"' in (machine.folder / "root/etc/fedhlm/agent.toml").read_text()


def test_failures_are_told_in_one_line_and_leave_nothing_behind(machine: Machine) -> None:
    away = machine.provision(name="unreachable")
    assert away.returncode == 2
    assert "cannot be reached by ssh: ssh: connect to host unreachable" in away.stderr
    cards.wheel(machine.wheels, "fedhlm", {"stand_in.py": "def main():\n    raise SystemExit(3)\n"})
    broken = machine.provision()
    assert broken.returncode == 2
    assert "refused to install" in broken.stderr
    assert len(broken.stderr.splitlines()) == 1
    assert not (machine.folder / "root/opt/fedhlm").exists()
    assert not (machine.folder / "home" / provision._UNPACKED).exists()
    machine.write("bin/uname", "#!/bin/sh\necho armv7l\n")
    old = machine.provision()
    assert old.returncode == 2
    assert "64-bit" in old.stderr
