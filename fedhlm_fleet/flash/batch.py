"""Orders for cards: one from the command line, or many from a CSV file, with the command line's values as defaults.

All orders are validated before the first card is written. A card that fails does not stop the others.
"""

import csv
import difflib
import lzma
import os
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from fedhlm.config import load, presets
from fedhlm.errors import ConfigError, FedhlmError
from fedhlm.process.files import PRIVATE, aside_of, replacing
from fedhlm_fleet.flash import cloudinit, disks
from fedhlm_fleet.flash.image import BootPartition, Folder, Target, boot_partition, needed_bytes, require_room
from fedhlm_fleet.flash.plan import Device, FlashError, Payload, PlannedFile, Wifi

COLUMNS: Final = (
    *("agent", "cluster", "broker", "hostname", "user", "ssh_key"),
    *("wifi_ssid", "wifi_password_file", "wifi_country", "wifi_hidden"),
    *("config", "cert", "key", "ca", "boot", "image", "device", "out"),
)
_BLOCK_BYTES: Final = 4 * 1024 * 1024
_MAX_TEXT_BYTES: Final = 1024 * 1024

Say = Callable[[str], None]


class BatchDevice(NamedTuple):
    """A device, its configuration so far, and its own certificate files (certificate, key, CA), if given."""

    device: Device
    settings: Mapping[str, Any]
    certificate: tuple[Path, Path, Path] | None


class Order(NamedTuple):
    """A device and the place of its card."""

    party: BatchDevice
    boot: Path | None
    image: Path | None
    disk: Path | None
    out: Path | None

    @property
    def device(self) -> Device:
        """The device that gets the card."""
        return self.party.device

    @property
    def place(self) -> Path:
        """The folder, disk or image that is written."""
        place = self.boot or self.disk or self.out or self.image
        assert place is not None  # noqa: S101  order_of has seen to it
        return place


class WrittenCard(NamedTuple):
    """A written card: the number of its files, their size in bytes, and the time that writing took."""

    order: Order
    files: int
    size: int
    seconds: float


def party_of(values: Mapping[str, str]) -> BatchDevice:
    """Build a device from the values of COLUMNS; an empty value counts as missing.

    Raises:
        ConfigError: a value is missing or not valid.
        FlashError: a file cannot be read.
    """
    given = {name: value for name, value in values.items() if value}
    for name in ("agent", "cluster", "broker"):
        if name not in given:
            raise ConfigError(f"--{name}", None, "given, here or in the CSV file")
    ssid, password_file = given.get("wifi_ssid", ""), given.get("wifi_password_file")
    hidden = given.get("wifi_hidden", "no")
    if hidden not in ("yes", "no"):
        raise ConfigError("wifi_hidden", hidden, "yes or no")
    if not ssid and (password_file or given.get("wifi_country") or hidden == "yes"):
        raise ConfigError("--wifi-ssid", None, "the name of the network if something else of it is given")
    wifi = None
    if ssid:
        password = _text(Path(password_file), "--wifi-password-file").rstrip("\r\n") if password_file else None
        wifi = Wifi.of(ssid, password, given.get("wifi_country", ""), hidden=hidden == "yes")
    key_file = given.get("ssh_key")
    device = Device.of(
        agent=given["agent"],
        cluster=given["cluster"],
        broker=given["broker"],
        hostname=given.get("hostname", ""),
        user=given.get("user", "pi"),
        ssh_key=_public_key(Path(key_file)) if key_file else "",
        wifi=wifi,
    )
    files = tuple(Path(given[name]) for name in ("cert", "key", "ca") if name in given)
    if len(files) not in (0, 3):
        raise ConfigError("--cert, --key, --ca", None, "given all three, or --pki")
    return BatchDevice(
        device,
        _settings(Path(given["config"]), device) if "config" in given else {},
        (files[0], files[1], files[2]) if files else None,
    )


def order_of(values: Mapping[str, str]) -> Order:
    """Build an order from the values of COLUMNS; an empty value counts as missing.

    Raises:
        ConfigError: a value is missing or not valid.
        FlashError: a file cannot be read.
    """
    given = {name: value for name, value in values.items() if value}
    party = party_of(given)
    boot, image, disk, out = (
        Path(given[name]) if name in given else None for name in ("boot", "image", "device", "out")
    )
    if (boot, image, disk) == (None, None, None) or (boot and (image or disk)) or (out and (not image or disk)):
        raise ConfigError(
            "--image, --boot, --device",
            None,
            "one of them (--image with --out or --device copies the image first)",
        )
    if out is not None and (out.is_dir() or not out.suffix):
        out = out / f"{party.device.agent}.img"
    return Order(party, boot, image, disk, out)


def read(path: Path, defaults: Mapping[str, str]) -> list[Order]:
    """Read the orders of a CSV file whose first line has the column names.

    Raises:
        FlashError: the message lists every error with its line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [str(name) for name in reader.fieldnames or ()]
            if unknown := [name for name in columns if name not in COLUMNS]:
                near = difflib.get_close_matches(unknown[0], COLUMNS, n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                raise FlashError(
                    f"columns in line 1 of {path} must be among {', '.join(COLUMNS)}{hint} (got {unknown[0]!r})"
                )
            if "agent" not in columns:
                raise FlashError(
                    f"line 1 of {path} must be the names of columns, 'agent' among them (got {', '.join(columns)})"
                )
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise FlashError(f"cannot read {path}: {getattr(exc, 'strerror', None) or exc}") from exc
    orders: list[Order] = []
    wrong: list[str] = []
    seen: dict[tuple[str, str], int] = {}
    for line, row in rows:
        if None in row or None in row.values():
            wrong.append(f"line {line} must be {len(columns)} cells")
            continue
        try:
            cells = {name: cell.strip() for name, cell in row.items() if cell.strip()}
            order = order_of({**_inherited(cells, defaults), **cells})
        except FedhlmError as exc:
            wrong.append(f"line {line}: {exc}")
            continue
        # Two devices with one name would close each other's connections to the cluster's broker.
        for what, key in (("agent", order.device.agent), ("target", str(order.place))):
            if (first := seen.setdefault((what, key), line)) != line:
                wrong.append(f"line {line}: {what} {key!r} is that of line {first} already")
        orders.append(order)
    if wrong:
        raise FlashError(f"{path}: {'; '.join(wrong)}")
    if not orders:
        raise FlashError(f"{path} has no line below the column names")
    return orders


def require_place(order: Order) -> None:
    """Check that a card can be made, before anything is downloaded for it.

    Raises:
        FlashError: the image, the folder or the disk cannot be used.
    """
    if order.boot is not None:
        Folder(order.boot).room()
    if order.disk is not None:
        disks.require_card(order.disk)
    if order.image is not None and order.image.suffix == ".xz" and not order.image.is_file():
        raise FlashError(f"--image must be a file (got {str(order.image)!r})")
    if order.image is not None and order.image.suffix != ".xz":
        boot_partition(order.image)


def make(order: Order, installed: Payload, say: Say, *, clock_s: Callable[[], float] = time.monotonic) -> WrittenCard:
    """Write one card.

    Raises:
        FlashError: the card cannot or must not be written.
    """
    begun_s = clock_s()
    parts = cloudinit.card(order.device, installed)
    with _target(order, parts, say) as target:
        size = require_room(target, parts)
        target.put(parts)
    return WrittenCard(order, len(parts), size, clock_s() - begun_s)


def make_all(
    orders: Sequence[Order], payload_of: Callable[[Order], Payload], say: Say
) -> tuple[list[WrittenCard], int]:
    """Write all cards, with a line about each; return those that were written, and how many failed."""
    done: list[WrittenCard] = []
    for number, order in enumerate(orders, 1):
        head = f"[{number}/{len(orders)}] {order.device.agent}"
        try:
            made = make(order, payload_of(order), lambda words, head=head: say(f"{head}: {words}"))  # type: ignore[misc]
        except FedhlmError as exc:
            if len(orders) == 1:
                raise
            say(f"{head}: FAILED, {exc}")
            continue
        done.append(made)
        say(f"{head}: {made.files} files, {made.size / 1e6:.1f} MB to {order.place} in {made.seconds:.1f} s")
    return done, len(orders) - len(done)


def described(order: Order, installed: Payload) -> Iterator[str]:
    """Describe what would be written; secrets appear by name and size only."""
    parts = cloudinit.card(order.device, installed)
    yield f"{order.device.agent} of {order.device.cluster}: {len(parts)} files to {order.place}"
    for part in parts:
        yield f"  {part.size:>10}  {part.path}{'  (secret)' if part.secret else ''}"
    if order.image is None or order.image.suffix != ".xz":
        target: Target = Folder(order.boot) if order.boot else BootPartition(order.image or order.place)
        room = target.room()
        yield f"  {needed_bytes(parts, room.cluster) / 1e6:.1f} MB of {(room.free + room.reusable) / 1e6:.1f} MB"
    yield ""
    yield from (f"  {line}" for line in cloudinit.masked(order.device).splitlines())


@contextmanager
def _target(order: Order, parts: Sequence[PlannedFile], say: Say) -> Iterator[Target]:
    if order.boot is not None:
        yield Folder(order.boot)
    elif order.disk is not None:
        image_bytes = order.image.stat().st_size if order.image is not None and order.image.is_file() else 0
        disks.require_card(order.disk, needed_bytes=image_bytes)
        if order.image is not None:
            with order.disk.open("r+b", buffering=0) as device:
                _copy(order.image, device, say)
        yield BootPartition(order.disk)
    elif order.out is not None and order.image is not None:
        # The file gets its name when it is complete, so that nobody takes a partial image for a whole one.
        try:
            if order.image.suffix != ".xz":
                require_room(BootPartition(order.image), parts)
            order.out.parent.mkdir(parents=True, exist_ok=True)
            # It will contain the card's private key and Wi-Fi password.
            with replacing(order.out, mode=PRIVATE) as file:
                _copy(order.image, file, say)
                yield BootPartition(aside_of(order.out))
        except OSError as exc:
            raise FlashError(f"cannot write {order.out}: {exc.strerror or exc}") from exc
    else:
        yield BootPartition(order.place)


def _copy(image: Path, to: IO[bytes], say: Say) -> None:
    if image.suffix != ".xz":
        boot_partition(image)
    total = image.stat().st_size if image.suffix != ".xz" else 0
    copied, told = 0, 0
    try:
        with lzma.open(image) if image.suffix == ".xz" else image.open("rb") as source:
            while block := source.read(_BLOCK_BYTES):
                to.write(block)
                copied += len(block)
                if total > 0 and (tenth := copied * 10 // total) > told:
                    told = tenth
                    if total > 64 * _BLOCK_BYTES:
                        say(f"{tenth * 10} % of {image.name}")
        to.flush()
        os.fsync(to.fileno())
    except (OSError, lzma.LZMAError, EOFError) as exc:
        raise FlashError(f"cannot copy {image}: {getattr(exc, 'strerror', None) or exc}") from exc


def _inherited(cells: Iterable[str], defaults: Mapping[str, str]) -> dict[str, str]:
    # A line that names a place does not inherit the place of the command line.
    places = {"boot", "device", "out"}
    own = places & set(cells)
    return {name: value for name, value in defaults.items() if not (own and name in places)}


def _settings(path: Path, device: Device) -> dict[str, Any]:
    text = _text(path, "--config")
    # The file is loaded as the agent will load it, so that an error shows here and not on the device.
    own = {"agent.id": device.agent, "cluster.name": device.cluster, "broker.url": device.broker}
    preset = load(file=path, flags=own, environ={}).config.preset
    if preset not in presets():
        raise ConfigError("preset", preset, "a shipped preset for a device", source=f"file {path}")
    return tomllib.loads(text)


def _public_key(path: Path) -> str:
    text = _text(path, "--ssh-key")
    if "PRIVATE KEY" in text:
        raise ConfigError(
            "--ssh-key", str(path), "the public key (its name ends in .pub)", why="this is the private one"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != 1:
        raise ConfigError("--ssh-key", str(path), "one public key", why=f"{len(lines)} lines")
    return lines[0]


def _text(path: Path, flag: str) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise ConfigError(flag, str(path), "a small text file")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise FlashError(f"{flag}: cannot read {path}: {getattr(exc, 'strerror', None) or exc}") from exc
