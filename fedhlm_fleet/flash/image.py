"""The boot partition of a card: in an image file or on a device (with mtools, without mounting), or a mounted folder.

A target reports its free space and takes files; they replace FOLDER as a whole. Space is counted in whole clusters, and
is checked before anything changes.
"""

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from fedhlm.process.files import sync
from fedhlm_fleet.flash.plan import FOLDER, FlashError, PlannedFile

SECTOR: Final = 512
_FAT_TYPES: Final = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E})
_ENTRY: Final = struct.Struct("<B3xB3xII")  # status, type, first sector, sectors
_FOLDER_CLUSTER: Final = 1
# A name of more than eight letters takes several entries of 32 bytes; each file counts with this much besides its
# content.
_ENTRY_BYTES: Final = 320


class Room(NamedTuple):
    """Free bytes, bytes that an earlier flash occupies, and bytes per cluster."""

    free: int
    reusable: int
    cluster: int


class Target(Protocol):
    """A place for a card's files."""

    @property
    def label(self) -> str:
        """The name of the target in messages."""
        ...

    def room(self) -> Room:
        """Return the space of the target.

        Raises:
            FlashError: the target is not a usable boot partition.
        """
        ...

    def put(self, parts: Sequence[PlannedFile]) -> None:
        """Replace FOLDER and the given files.

        Raises:
            FlashError: the target cannot be written.
        """
        ...


class Partition(NamedTuple):
    """First byte and length of a partition."""

    start: int
    size: int


class _Written:
    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def label(self) -> str:
        """The path of the folder, image or device."""
        return str(self.path)


class Folder(_Written):
    """A boot partition that the system has mounted, or a folder with its files."""

    def room(self) -> Room:
        """Return the space of the file system. Raises FlashError if it is not the boot partition of a Raspberry Pi."""
        if not self.path.is_dir():
            raise FlashError(f"--boot must be the folder of a mounted boot partition (got {str(self.path)!r})")
        if not any((self.path / name).is_file() for name in ("cmdline.txt", "config.txt")):
            raise FlashError(f"--boot {self.path}: a Raspberry Pi's boot partition has cmdline.txt and config.txt")
        held = sum(file.stat().st_size for file in (self.path / FOLDER).rglob("*") if file.is_file())
        found = os.statvfs(self.path)
        return Room(found.f_bavail * found.f_frsize, held, found.f_frsize)

    def put(self, parts: Sequence[PlannedFile]) -> None:
        """Copy the parts; only the owner can read secret ones, if the file system supports owners."""
        try:
            shutil.rmtree(self.path / FOLDER, ignore_errors=True)
            _lay_out(self.path, parts)
            os.sync()
        except OSError as exc:
            raise FlashError(f"cannot write to {self.path}: {exc.strerror or exc}") from exc


class BootPartition(_Written):
    """The FAT boot partition of an image file or device, accessed with mtools."""

    def room(self) -> Room:
        """Return the space of the first FAT partition. Raises FlashError if it is missing or incomplete."""
        cluster = self._cluster()
        listing = _mtool("mdir", "-i", self._drive(), "::/", image=self.path)
        free = "".join(c for line in listing.splitlines() if line.endswith("bytes free") for c in line if c.isdigit())
        if not free:
            raise FlashError(f"{self.path}: mdir does not report the free space of its boot partition")
        held = 0
        if FOLDER.upper() in listing.upper().split():
            counted = _mtool("mdu", "-i", self._drive(), "-s", f"::/{FOLDER}", image=self.path).split()
            held = int(counted[-1]) * cluster if counted and counted[-1].isdigit() else 0
        return Room(int(free), held, cluster)

    def put(self, parts: Sequence[PlannedFile]) -> None:
        """Copy the parts with mcopy. FAT has no owners: install.sh moves secrets to a place that only root can read."""
        drive = self._drive()
        with tempfile.TemporaryDirectory(prefix="fedhlm-card-") as scratch:
            staged = Path(scratch)
            try:
                _lay_out(staged, parts, link=True)
            except OSError as exc:
                raise FlashError(f"cannot prepare the files of {self.path}: {exc.strerror or exc}") from exc
            if FOLDER.upper() in _mtool("mdir", "-i", drive, "::/", image=self.path).upper().split():
                _mtool("mdeltree", "-i", drive, f"::/{FOLDER}", image=self.path)
            tops = sorted(str(path) for path in staged.iterdir())
            _mtool("mcopy", "-i", drive, "-s", "-Q", "-o", *tops, "::/", image=self.path)
        sync(self.path)

    def _drive(self) -> str:
        return f"{self.path}@@{boot_partition(self.path).start}"

    def _cluster(self) -> int:
        start = boot_partition(self.path).start
        with self.path.open("rb") as file:
            file.seek(start)
            head = file.read(SECTOR)
        sector, clusters = struct.unpack_from("<HB", head, 11)
        if head[510:] != b"\x55\xaa" or sector not in (512, 1024, 2048, 4096) or clusters == 0:
            raise FlashError(f"{self.path}: its first FAT partition holds no FAT file system")
        return int(sector * clusters)


def boot_partition(path: Path) -> Partition:
    """Return the first FAT partition of a disk with a master boot record.

    Raises:
        FlashError: the file cannot be read, is compressed, has no partition table or no FAT partition, or ends too early.
    """
    try:
        with path.open("rb") as file:
            head = file.read(SECTOR)
            size = file.seek(0, os.SEEK_END)
    except OSError as exc:
        raise FlashError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if head.startswith((b"\xfd7zXZ", b"\x1f\x8b", b"PK", b"\x28\xb5\x2f\xfd")):
        raise FlashError(f"{path} is compressed: unpack it first (xz --decompress --keep)")
    if len(head) < SECTOR or head[510:] != b"\x55\xaa":
        raise FlashError(f"{path} must be an image of Raspberry Pi OS (got a file without a partition table)")
    for index in range(4):
        _, kind, first, sectors = _ENTRY.unpack_from(head, 446 + 16 * index)
        if kind == 0xEE:
            raise FlashError(f"{path} has a GPT: Raspberry Pi OS uses an MBR")
        if kind in _FAT_TYPES and sectors:
            if (first + sectors) * SECTOR > size:
                raise FlashError(
                    f"{path} has {size} bytes: its boot partition ends at {(first + sectors) * SECTOR}; is it whole?"
                )
            return Partition(first * SECTOR, sectors * SECTOR)
    raise FlashError(f"{path} has no FAT partition: an image of Raspberry Pi OS has one for booting")


def needed_bytes(parts: Sequence[PlannedFile], cluster: int) -> int:
    """Return the space in bytes that the parts take in whole clusters, with their names and folders."""
    folders = {parent for part in parts for parent in Path(part.path).parents if parent != Path()}
    content = sum(-(-part.size // cluster) * cluster for part in parts)
    return content + _FOLDER_CLUSTER * len(folders) * cluster + _ENTRY_BYTES * len(parts)


def require_room(target: Target, parts: Sequence[PlannedFile]) -> int:
    """Check that the parts fit on a target, and return the space in bytes that they take.

    Raises:
        FlashError: the parts do not fit; the message has the needed and the free space.
    """
    room = target.room()
    needed = needed_bytes(parts, room.cluster)
    if needed > room.free + room.reusable:
        raise FlashError(
            f"{target.label}: the files need {needed / 1e6:.1f} MB, and {(room.free + room.reusable) / 1e6:.1f} MB are free: "
            "leave the model out, or send it afterwards with `fedhlm provision ssh`"
        )
    return needed


def _lay_out(top: Path, parts: Sequence[PlannedFile], *, link: bool = False) -> None:
    for part in parts:
        path = top / part.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(part.source, Path):
            # mcopy follows links, which saves a second copy of about 70 MB.
            if link:
                path.symlink_to(part.source.resolve())
            else:
                shutil.copyfile(part.source, path)
            continue
        if part.secret:
            path.unlink(missing_ok=True)
            path.touch(mode=0o600)
        path.write_bytes(part.source)


def _mtool(program: str, *arguments: str, image: Path) -> str:
    found = shutil.which(program)
    if found is None:
        raise FlashError(f"{program} is not installed: sudo apt install mtools")
    # Without these, mtools asks questions, and rejects sizes that the image of Raspberry Pi OS has by design.
    environ = {**os.environ, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8", "MTOOLSRC": os.devnull}
    done = subprocess.run(  # noqa: S603  the program is known, and no shell reads the arguments
        [found, *arguments], env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise FlashError(f"{program} failed on {image}: {said or done.returncode}")
    return done.stdout
