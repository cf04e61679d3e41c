"""Which disks may be written: whatever is mounted, in use, fixed or unclear is refused, at any depth."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_fleet.flash import disks
from fedhlm_fleet.flash.disks import BlockDevice
from fedhlm_fleet.flash.plan import FlashError

NOTHING: frozenset[str] = frozenset()


def row(**given: Any) -> dict[str, Any]:
    card = {"name": "sdx", "path": "/dev/sdx", "type": "disk", "size": 32_000_000_000, "rm": True, "ro": False}
    return {**card, "tran": "usb", "model": "STORAGE ", "maj:min": "8:16", "mountpoints": [None], **given}


def part(**given: Any) -> dict[str, Any]:
    return row(**{"name": "sdx1", "path": "/dev/sdx1", "type": "part", "maj:min": "8:17", **given})


def refusal(data: dict[str, Any], mounted: frozenset[str] = NOTHING, needed: int = 0) -> str | None:
    return disks.refusal(BlockDevice.of(data), mounted=mounted, needed_bytes=needed)


def test_a_card_in_a_reader_is_accepted() -> None:
    assert refusal(row(children=[part(), part(**{"maj:min": "8:18"})])) is None
    assert refusal(row(rm="1", ro="0", tran=None, size="32000000000")) is None
    assert refusal(row(rm=False, tran=None, path="/dev/mmcblk0")) is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (part(), "type part"),
        (row(type="loop"), "type loop"),
        (row(rm=False, tran="sata"), "must be removable"),
        (row(rm=False, tran="nvme"), "must be removable"),
        (row(ro=True), "write-protected"),
        (row(size=0), "no card"),
        (row(mountpoints=["/mnt"]), "in use at /mnt"),
        (row(children=[part(mountpoints=["/boot/firmware"])]), "in use at /boot/firmware"),
        (row(children=[part(mountpoints=["[SWAP]"])]), r"in use at \[SWAP\]"),
        (row(children=[part(children=[row(type="crypt", path="/dev/mapper/x")])]), "in use"),
        (row(children=[part(children=[row(type="lvm", mountpoints=["/"])])]), "in use at /"),
    ],
)
def test_others_are_refused_with_the_reason(data: dict[str, Any], reason: str) -> None:
    said = refusal(data)
    assert said is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said)


def test_an_image_larger_than_the_card_is_refused() -> None:
    assert "33.0 GB are needed" in str(refusal(row(), needed=33_000_000_000))


@given(st.integers(1, 4), st.data())
def test_a_mount_is_found_however_deep(depth: int, data: st.DataObject) -> None:
    """lsblk may not name the mount (another namespace); the kernel's number does."""
    numbers = [f"8:{16 + level}" for level in range(depth + 1)]
    tree = part(**{"maj:min": numbers[-1]})
    for number in reversed(numbers[1:-1]):
        tree = part(**{"maj:min": number}, children=[tree])
    tree = row(**{"maj:min": numbers[0]}, children=[tree])
    assert refusal(tree) is None
    held = data.draw(st.sampled_from(numbers))
    assert "is mounted" in str(refusal(tree, frozenset({held})))


def test_the_kernel_s_mounts_include_the_root() -> None:
    root = Path("/").stat().st_dev
    assert f"{os.major(root)}:{os.minor(root)}" in disks.mounted_numbers()


def test_mounts_are_read_from_the_kernel_s_table(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text("22 1 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\n30 22 8:17 / /media/card rw - vfat /dev/sdx1 rw\n")
    found = disks.mounted_numbers(table, tmp_path / "none")
    assert {"259:2", "8:17"} <= found


def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlashError, match="No such file"):
        disks.require_card(tmp_path / "sdx")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", Path("/dev/null"), tmp_path):
        with pytest.raises(FlashError, match="must be a disk such as /dev/sdX"):
            disks.require_card(path)


def test_every_disk_that_holds_this_system_is_refused() -> None:
    """On a machine that shows its disks; the root's own number is known everywhere and refused by `refusal`."""
    device = Path("/").stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    assert "is mounted" in str(refusal(row(children=[part(**{"maj:min": number})]), disks.mounted_numbers()))
    for path in sorted(Path("/dev").glob("[snv]*")):
        shown = path.stat()
        if stat.S_ISBLK(shown.st_mode) and shown.st_rdev == device:
            with pytest.raises(FlashError, match="is not touched"):
                disks.require_card(path)
