"""Protection of disks: only a removable disk that nothing uses may be written.

`refusal` decides from the output of lsblk and the mounted devices; it opens no disk.
"""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from fedhlm_fleet.flash.plan import FlashError

_COLUMNS: Final = "NAME,PATH,TYPE,SIZE,RM,RO,TRAN,MODEL,MAJ:MIN,MOUNTPOINTS,FSTYPE"
_REMOVABLE: Final = ("usb", "mmc")


class BlockDevice(NamedTuple):
    """A disk or a partition, as lsblk describes it. `number` is MAJOR:MINOR."""

    path: str
    kind: str
    size: int
    removable: bool
    read_only: bool
    transport: str
    model: str
    number: str
    mounts: tuple[str, ...]
    children: tuple["BlockDevice", ...]

    @classmethod
    def of(cls, row: dict[str, Any]) -> "BlockDevice":
        """Read one of lsblk's JSON objects."""
        return cls(
            path=str(row.get("path") or f"/dev/{row['name']}"),
            kind=str(row.get("type") or ""),
            size=int(row.get("size") or 0),
            removable=_true(row.get("rm")),
            read_only=_true(row.get("ro")),
            transport=str(row.get("tran") or ""),
            model=str(row.get("model") or "").strip(),
            number=str(row.get("maj:min") or "").strip(),
            mounts=tuple(str(mount) for mount in row.get("mountpoints") or [row.get("mountpoint")] if mount),
            children=tuple(cls.of(child) for child in row.get("children") or ()),
        )

    def all(self) -> Iterator["BlockDevice"]:
        """Yield the device itself and everything on it."""
        yield self
        for child in self.children:
            yield from child.all()


def refusal(disk: BlockDevice, *, mounted: frozenset[str], needed_bytes: int = 0) -> str | None:
    """Return why a disk must not be written, or None. `mounted` are the MAJOR:MINOR numbers of mounted devices."""
    if disk.kind != "disk":
        return f"it must be a whole disk (got type {disk.kind or 'unknown'})"
    for block in disk.all():
        if block.mounts:
            return f"{block.path} is in use at {', '.join(block.mounts)}: unmount it, if it is the right card"
        if block.number in mounted:
            return f"{block.path} is mounted"
        if block.kind not in ("disk", "part"):
            return f"{block.path} on it is in use ({block.kind})"
    if not (disk.removable or disk.transport in _REMOVABLE or disk.path.startswith("/dev/mmcblk")):
        return "it must be removable, such as a card in a reader"
    if disk.read_only:
        return "it is write-protected"
    if disk.size == 0:
        return "there is no card in the reader"
    if disk.size < needed_bytes:
        return f"it holds {disk.size / 1e9:.1f} GB, and {needed_bytes / 1e9:.1f} GB are needed"
    return None


def require_card(path: Path, *, needed_bytes: int = 0) -> BlockDevice:
    """Return the disk at `path` if it may be written.

    Raises:
        FlashError: the disk must not be written; the message says why.
    """
    try:
        is_block = stat.S_ISBLK(path.stat().st_mode)
    except OSError as exc:
        raise FlashError(f"--device {path}: {exc.strerror or exc}") from exc
    if not is_block:
        raise FlashError(f"--device must be a disk such as /dev/sdX (got {str(path)!r}); --image takes files")
    disk = _lsblk(path)
    if reason := refusal(disk, mounted=mounted_numbers(), needed_bytes=needed_bytes):
        raise FlashError(f"--device {path} is not touched: {reason}")
    return disk


def mounted_numbers(
    mountinfo: Path = Path("/proc/self/mountinfo"), swaps: Path = Path("/proc/swaps")
) -> frozenset[str]:
    """Return MAJOR:MINOR of every mounted file system, of the root device and of swap."""
    numbers = {line.split()[2] for line in mountinfo.read_text("utf-8", "replace").splitlines() if line.strip()}
    devices = [Path("/").stat().st_dev]
    for line in swaps.read_text("utf-8", "replace").splitlines()[1:] if swaps.exists() else ():
        swap = Path(line.split()[0])
        if swap.exists() and stat.S_ISBLK(swap.stat().st_mode):
            devices.append(swap.stat().st_rdev)
    return frozenset(numbers | {f"{os.major(device)}:{os.minor(device)}" for device in devices})


def _lsblk(path: Path) -> BlockDevice:
    program = shutil.which("lsblk")
    if program is None:
        raise FlashError("lsblk is not installed: sudo apt install util-linux")
    command = [program, "--json", "--bytes", "--output", _COLUMNS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  no shell
    try:
        rows = json.loads(done.stdout)["blockdevices"]
        return BlockDevice.of(rows[0])
    except (ValueError, KeyError, IndexError) as exc:
        raise FlashError(f"--device {path} is unknown to lsblk ({done.stderr.strip() or exc})") from exc


def _true(value: object) -> bool:
    return value in (True, "1", 1, "true")
