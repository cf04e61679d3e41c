"""Boot partitions: found or refused with a reason, written by mtools and read back, never half."""

import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_fleet.flash import image
from fedhlm_fleet.flash.image import BootPartition, Folder
from fedhlm_fleet.flash.plan import FlashError, PlannedFile
from tests.fedhlm_fleet.flash import cards

PARTS = [
    PlannedFile("fedhlm/install.sh", b"#!/bin/sh\n"),
    PlannedFile("fedhlm/wheels/a_rather_long_name-1.0-cp313-cp313-manylinux_2_28_aarch64.whl", b"w" * 100_000),
    PlannedFile("fedhlm/tls/client.key", b"key", secret=True),
    PlannedFile("user-data", b"#cloud-config\n"),
]


def record(*partitions: tuple[int, int, int]) -> bytes:
    """A master boot record with these (type, first sector, sectors)."""
    table = b"".join(struct.pack("<B3xB3xII", 0, *partition) for partition in partitions)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


@given(st.integers(1, 5_000), st.integers(1, 5_000), st.sampled_from([0x0B, 0x0C, 0x0E]))
def test_the_first_fat_partition_is_found(start: int, sectors: int, kind: int) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(record((0x83, 1, 1), (kind, start, sectors), (0x0C, 9, 9)))
        file.truncate((start + sectors) * 512)
        file.flush()
        path = Path(file.name)
        assert image.boot_partition(path) == (start * 512, sectors * 512)
        file.truncate((start + sectors) * 512 - 1)
        with pytest.raises(FlashError, match="is it whole"):
            image.boot_partition(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "without a partition table"),
        (bytes(512), "without a partition table"),
        (record(), "no FAT partition"),
        (record((0x83, 1, 1)), "no FAT partition"),
        (record((0xEE, 1, 1)), "GPT"),
        (b"\xfd7zXZ\0" + bytes(600), "compressed"),
        (b"\x1f\x8b" + bytes(600), "compressed"),
    ],
)
def test_what_is_no_card_is_refused_with_the_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(content)
    with pytest.raises(FlashError, match=reason):
        image.boot_partition(path)


def test_a_partition_without_a_file_system_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(record((0x0C, 1, 4)) + bytes(4 * 512))
    with pytest.raises(FlashError, match="holds no FAT"):
        BootPartition(path).room()


def test_parts_are_written_and_what_an_earlier_flash_left_is_gone(tmp_path: Path) -> None:
    card = cards.make(tmp_path / "sd.img")
    disk = BootPartition(card)
    disk.put([*PARTS, PlannedFile("fedhlm/wheels/old.whl", b"old")])
    disk.put(PARTS)
    assert cards.names(card) == sorted(["cmdline.txt", "config.txt", *(part.path for part in PARTS)])
    for part in PARTS:
        assert cards.read(card, part.path).encode() == part.source


def test_the_room_counted_is_enough_and_told_beforehand(tmp_path: Path) -> None:
    card = cards.make(tmp_path / "sd.img", sectors=32_768)
    disk = BootPartition(card)
    room = disk.room()
    before = card.read_bytes()
    with pytest.raises(FlashError, match="MB are free"):
        image.require_room(disk, [PlannedFile("fedhlm/big", bytes(room.free + 1))])
    assert card.read_bytes() == before
    # As much as is said to fit does fit, in many small files, and again in the place of the earlier ones.
    count = 200
    each = (room.free // count - 3 * room.cluster - 400) // room.cluster * room.cluster
    many = [
        PlannedFile(f"fedhlm/wheels/some_long_name_of_a_wheel_{index}.whl", bytes(each + 1)) for index in range(count)
    ]
    for _ in range(2):
        image.require_room(disk, many)
        disk.put(many)
    assert disk.room().reusable >= sum(part.size for part in many)


def test_a_mounted_folder_is_written_and_only_a_boot_partition_is(tmp_path: Path) -> None:
    with pytest.raises(FlashError, match=r"cmdline\.txt"):
        Folder(tmp_path).room()
    (tmp_path / "config.txt").touch()
    stale = tmp_path / "fedhlm" / "old"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    folder = Folder(tmp_path)
    assert folder.room().reusable == 3
    folder.put(PARTS)
    assert not stale.exists()
    for part in PARTS:
        assert (tmp_path / part.path).read_bytes() == part.source
    assert (tmp_path / "fedhlm/tls/client.key").stat().st_mode & 0o077 == 0
