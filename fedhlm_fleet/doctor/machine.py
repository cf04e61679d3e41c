"""Checks of the machine itself: word size, processor, Python, libraries, clock, memory. None needs a configuration."""

import ctypes
import os
import re
import struct
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Final

from fedhlm.protocol.roles import PartRole
from fedhlm_fleet.doctor.finding import Remark, Subject, fail, ok, skip, warn

MIB: Final = 1024 * 1024
PYTHON_MIN: Final = (3, 11)
ARCHITECTURES: Final = {"x86_64": "avx2", "amd64": "avx2", "aarch64": "asimd", "arm64": "asimd"}  # and what int8 needs
# Optional instructions that speed up int8 products: dot products of four bytes at once.
DOT_PRODUCTS: Final = {"avx2": ("avx_vnni", "avx512_vnni"), "asimd": ("asimddp",)}
# Resident memory of each part without its model, measured in the demo and rounded up.
NEED_MIB: Final[dict[PartRole, int]] = {"agent": 128, "edge": 96, "cloud": 256}
_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9._-]+)(?:\[[\w,-]+\])?\s*([<>=!~,.\w\s]*?)\s*(?:;\s*(.*))?")
_TIME_ERROR: Final = 5  # adjtimex: the clock is not synchronised


def system(subject: Subject) -> Remark:
    """Check for a 64-bit kernel and a 64-bit Python, which onnxruntime requires."""
    bits = struct.calcsize("P") * 8
    release = f"{os.uname().sysname} {os.uname().release}"
    advice = (
        "install the 64-bit system image (for a Raspberry Pi: Raspberry Pi OS (64-bit)); 32 bits have no onnxruntime"
    )
    if subject.machine not in ARCHITECTURES:
        return fail(f"the machine must be x86_64 or aarch64 (got {subject.machine}, {release})", advice)
    if bits != 64:
        return fail(f"{bits}-bit Python on {subject.machine}, {release}", advice)
    return ok(f"64 bits, {subject.machine}, {release}")


def processor(subject: Subject) -> Remark:
    """Check for the vector instructions that int8 arithmetic uses."""
    text = (subject.proc / "cpuinfo").read_text("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    flags = set(lines[0].partition(":")[2].split()) if lines else set()
    needed = ARCHITECTURES.get(subject.machine, "")
    cores = os.cpu_count() or 1
    if needed not in flags:
        found = f"{cores} cores without {needed}" if flags else f"{cores} cores, their features are not listed"
        return warn(found, "the model runs slowly here: see the decode speed below")
    fast = [flag for flag in DOT_PRODUCTS[needed] if flag in flags]
    return ok(f"{cores} cores, {needed}{', ' + fast[0] if fast else ', without int8 dot products'}")


def python(_: Subject) -> Remark:
    """Check the Python version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < PYTHON_MIN:
        return fail(
            f"Python {version}", f"install Python {'.'.join(map(str, PYTHON_MIN))} or newer, and fedhlm with it"
        )
    return ok(f"Python {version}, {sys.executable}")


def libraries(subject: Subject) -> Remark:
    """Check the installed versions against the requirements of this part's extra."""
    try:
        requirements = subject.requires()
    except metadata.PackageNotFoundError:
        return warn(
            "fedhlm is not installed as a package", f"pip install 'fedhlm[{subject.role}]', so that versions are known"
        )
    wrong, right = [], 0
    for requirement in requirements:
        matched = _REQUIREMENT.fullmatch(requirement)
        if matched is None or not _wanted(matched[3], subject.role):
            continue
        name, limits = matched[1], matched[2]
        try:
            version = subject.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} must be {limits} (got none)")
            continue
        if satisfies(version, limits):
            right += 1
        else:
            wrong.append(f"{name} must be {limits} (got {version})")
    if wrong:
        return fail("; ".join(wrong), f"{sys.executable} -m pip install --upgrade 'fedhlm[{subject.role}]'")
    return ok(f"{right} libraries as required")


def _wanted(marker: str | None, role: PartRole) -> bool:
    return not marker or re.fullmatch(rf"extra\s*==\s*[\"']{role}[\"']", marker.strip()) is not None


def satisfies(version: str, limits: str) -> bool:
    """Return whether a version satisfies limits such as `>=2.5.1,<3`; suffixes after the numbers are ignored."""
    compare = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    have = _release(version)
    for limit in filter(None, (part.strip() for part in limits.split(","))):
        operator = next(sign for sign in compare if limit.startswith(sign))
        wanted = _release(limit.removeprefix(operator))
        width = max(len(have), len(wanted))
        padded = [numbers + (0,) * (width - len(numbers)) for numbers in (have, wanted)]
        if not compare[operator](*padded):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    matched = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(map(int, matched[0].split("."))) if matched else ()


def clock(subject: Subject) -> Remark:
    """Check that the clock is synchronised, and later than the installation of this software.

    Certificates need the right date. Deadlines on the bus are time spans, which a wrong clock does not affect.
    """
    now_s = subject.wall_s()
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    sync = "switch on time synchronisation: sudo timedatectl set-ntp true"
    if now_s < Path(__file__).stat().st_mtime - 86_400.0:
        return fail(f"{shown}, which is before this software was installed: no certificate is valid then", sync)
    synchronised = _synchronised()
    if synchronised is None:
        return warn(f"{shown}, and the kernel does not say whether it is synchronised", sync)
    if not synchronised:
        return warn(f"{shown}, not synchronised", sync)
    return ok(f"{shown}, synchronised")


def _synchronised() -> bool | None:
    buffer = ctypes.create_string_buffer(512)  # struct timex with room; all zeros asks and sets nothing
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def memory(subject: Subject) -> Remark:
    """Check that the free memory, also within the limit of the control group, is enough for the part and its model."""
    need = NEED_MIB[subject.role]
    if subject.model is not None and subject.model.info is not None:
        # The graph is read into memory, and its weights are unpacked into a second copy.
        need += 2 * sum(file.bytes for file in subject.model.info.files.values()) // MIB
    try:
        lines = (subject.proc / "meminfo").read_text("ascii").splitlines()
    except OSError as exc:
        return skip(f"the kernel does not say ({exc.strerror})")
    sizes = {line.partition(":")[0]: int(line.split()[1]) // 1024 for line in lines if len(line.split()) > 1}
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    limit = _cgroup_limit(subject.cgroup)
    if limit is not None:
        total, available = min(total, limit), min(available, limit)
    found = f"{available} MiB of {total} MiB are free, about {need} MiB are needed"
    if total < need:
        return fail(
            found, "use a smaller or more strongly quantised model, or a machine (or MemoryMax=) with more memory"
        )
    if available < need:
        return warn(found, "end other programs (if this part is running already, it has its share)")
    return ok(found)


def _cgroup_limit(folder: Path) -> int | None:
    try:
        text = (folder / "memory.max").read_text("ascii").strip()
    except OSError:
        return None
    return int(text) // MIB if text.isdigit() else None
