"""Set-up of a running machine over ssh, with the same payload and installer as a card.

One connection queries the machine, `python_for` and `obstacle` decide, and a second one sends and installs the payload.
The system's own ssh runs in batch mode: it asks nothing, and uses the operator's keys and known hosts.
"""

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from typing import IO, Final, NamedTuple

from fedhlm.errors import ConfigError
from fedhlm_fleet.flash.bundle import PYTHONS
from fedhlm_fleet.flash.plan import FlashError, Payload, PlannedFile

MACHINES: Final = ("aarch64", "x86_64")
# The wheels of numpy and onnxruntime require it.
LEAST_GLIBC: Final = (2, 28)
LEAST_SYSTEMD: Final = 247
_SSH_FAILED: Final = 255
_UNPACKED: Final = ".fedhlm-install"
_NO_SUDO: Final = "no"

PROBE: Final = r"""
echo "machine=$(uname -m)"
echo "python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
echo "glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d ' ' -f 2)"
echo "system=$(. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME")"
echo "systemd=$(systemctl --version 2>/dev/null | head -n 1 | cut -d ' ' -f 2)"
echo "sudo=$(if [ "$(id -u)" = 0 ]; then echo root; elif sudo -n true 2>/dev/null; then echo yes; else echo no; fi)"
echo "installed=$(readlink "${FEDHLM_ROOT:-}/opt/fedhlm" | sed 's/^fedhlm-//')"
"""
# The files are unpacked where only the user can read them, and are removed afterwards in any case.
_INSTALL: Final = f"""
set -eu
umask 077
cd
rm -rf {_UNPACKED}
mkdir {_UNPACKED}
trap 'rm -rf {_UNPACKED}' EXIT
tar -xf - -C {_UNPACKED}
"""

Run = Callable[[str, IO[bytes] | None], str]


class Host(NamedTuple):
    """The properties of a machine; "" means that one is missing. `installed` is the digest of the installed payload."""

    machine: str
    python: str
    glibc: str
    system: str
    systemd: str
    sudo: str
    installed: str

    @classmethod
    def parse(cls, text: str) -> "Host":
        """Parse the output of PROBE.

        Raises:
            FlashError: a property is missing in the output.
        """
        found = dict(line.partition("=")[::2] for line in text.splitlines() if "=" in line)
        if missing := [name for name in cls._fields if name not in found]:
            raise FlashError(f"the machine must be a Linux with a POSIX shell (it did not say its {missing[0]})")
        return cls(**{name: found[name].strip() for name in cls._fields})


def python_for(host: Host, *, wanted: str | None, interpreter: bool) -> str:
    """Return the Python version of the bundle: that of the interpreter sent along, or the machine's own.

    Raises:
        ConfigError: an interpreter is sent along, and its version is not given.
        FlashError: the machine's version is not supported, and no interpreter is sent along.
    """
    if interpreter:
        if wanted is None:
            raise ConfigError("--python", None, "the version of --interpreter")
        return wanted
    if host.python in PYTHONS and wanted in (None, host.python):
        return host.python
    raise FlashError(
        f"{host.system or 'the machine'} has Python {host.python or 'no'}, and {wanted or ', '.join(PYTHONS)} is needed: "
        "send one along with --interpreter FILE (python-build-standalone's ...install_only.tar.gz), docs/devices.md"
    )


def obstacle(host: Host) -> str | None:
    """Return why nothing can be installed on this machine, or None."""
    if host.machine not in MACHINES:
        return f"its system must be a 64-bit one, {' or '.join(MACHINES)} (got {host.machine})"
    try:
        glibc = tuple(int(number) for number in host.glibc.split("."))
    except ValueError:
        glibc = ()
    if glibc < LEAST_GLIBC:
        return f"its glibc must be 2.28 or newer (got {host.glibc or 'another C library'}); use a container there"
    if not host.systemd.isdecimal() or int(host.systemd) < LEAST_SYSTEMD:
        return f"its systemd must be {LEAST_SYSTEMD} or newer (got {host.systemd or 'none'})"
    if host.sudo == _NO_SUDO:
        return "this user must be allowed sudo without a password: allow it, or log in as root"
    return None


def over_ssh(host: str, *, port: int | None = None, identity: str = "") -> Run:
    """Return a function that runs a shell command on `host` and returns its output.

    Raises (the function):
        FlashError: ssh or the command fails; the message contains the end of its error output.
    """
    program = shutil.which("ssh")
    if program is None:
        raise FlashError("ssh is not installed: sudo apt install openssh-client")
    if not host or host.startswith("-") or any(c.isspace() for c in host):
        raise ConfigError("HOST", host, "[USER@]HOST")
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15", *(["-p", str(port)] if port else [])]
    options += ["-i", identity] if identity else []

    def run(command: str, stdin: IO[bytes] | None) -> str:
        done = subprocess.run(  # noqa: S603  no local shell; the remote one gets commands of this module
            [program, *options, "--", host, command],
            stdin=stdin if stdin is not None else subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            words = done.stderr.decode("utf-8", "replace").split("\n")
            said = "; ".join(line.strip() for line in words if line.strip())[-400:]
            what = "cannot be reached by ssh" if done.returncode == _SSH_FAILED else "refused to install"
            raise FlashError(f"{host} {what}: {said or f'exit status {done.returncode}'}")
        return done.stdout.decode("utf-8", "replace")

    return run


def probe(run: Run) -> Host:
    """Query the properties of a machine.

    Raises:
        FlashError: the machine cannot be reached or cannot be used; the message says why.
    """
    host = Host.parse(run(PROBE, None))
    if reason := obstacle(host):
        raise FlashError(f"nothing was installed: {reason}")
    return host


def install(run: Run, host: Host, payload: Payload) -> bool:
    """Send and install the payload; send nothing and return False if the machine already has this payload.

    Raises:
        FlashError: the installation fails; the former installation keeps running.
    """
    if host.installed == payload.digest:
        return False
    as_root = "" if host.sudo == "root" else "sudo -n "
    with tempfile.TemporaryFile() as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for part in payload.parts:
                _add(tar, part)
        archive.seek(0)
        run(f"{_INSTALL}{as_root}sh {_UNPACKED}/install.sh\n", archive)
    return True


def _add(tar: tarfile.TarFile, part: PlannedFile) -> None:
    info = tarfile.TarInfo(part.path)
    info.size = part.size
    info.mode = 0o600 if part.secret else 0o644
    if isinstance(part.source, bytes):
        tar.addfile(info, io.BytesIO(part.source))
        return
    with part.source.open("rb") as file:
        tar.addfile(info, file)
