"""The data of a device: its names, the files that it gets, and which of them are secret.

A payload is the set of files beside `install.sh`, on a card's boot partition or in a folder sent over ssh. Its `digest`
covers the content but not the time of making: with equal digests there is nothing to install.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.errors import ConfigError, FedhlmError
from fedhlm.protocol.fields import NAME_PATTERN
from fedhlm_fleet.flash import toml

FOLDER: Final = "fedhlm"
INSTALLER: Final = "install.sh"
UNIT: Final = "fedhlm-agent.service"
PLAIN: Final = "plain.conf"
CUDA: Final = "cuda.conf"
CONFIGURATION: Final = "agent.toml"
SUMS: Final = "SHA256SUMS"
MADE: Final = "made"
IDENTITY: Final = "bundle.id"
MODEL_AT: Final = "/opt/fedhlm/model"

_NAME: Final = re.compile(NAME_PATTERN)
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_COUNTRY: Final = re.compile(r"(?!UK|EU)[A-Z]{2}")  # people write these two, which no table of radio rules has
_NUMBERS: Final = re.compile(r"[\d ;]*;[\d ;]*")  # NetworkManager reads such a name as a list of bytes
_KEY: Final = re.compile(r"(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [^\r\n]*)?")
_PSK: Final = re.compile(r"[0-9a-fA-F]{64}")


class FlashError(FedhlmError):
    """A card, image, bundle or machine cannot be set up as requested."""


class Wifi(msgspec.Struct, frozen=True, kw_only=True):
    """A Wi-Fi network. `password` is a passphrase, a key of 64 hex digits, or "" for an open network.

    A key opens WPA2 networks only: it is derived from the passphrase (IEEE 802.11i, H.4), and WPA3 derives its own.
    A `hidden` network does not announce its name, so the device must call it.
    """

    ssid: str
    password: str = ""
    country: str = ""
    hidden: bool = False

    @classmethod
    def of(cls, ssid: str, password: str | None, country: str, *, hidden: bool = False) -> "Wifi":
        """Check the parts of a network.

        Raises:
            ConfigError: the name, password or country is not valid; the message does not show the password.
        """
        if not 1 <= len(ssid.encode()) <= 32 or not ssid.isprintable():
            raise ConfigError("--wifi-ssid", ssid, "1..32 bytes of text")
        if _NUMBERS.fullmatch(ssid):
            raise ConfigError("--wifi-ssid", ssid, "more than numbers and semicolons, which are read as bytes")
        if not _COUNTRY.fullmatch(country):
            raise ConfigError(
                "--wifi-country", country, "the two letters of ISO 3166, such as DE or GB, since radio rules differ"
            )
        if password is None:
            return cls(ssid=ssid, country=country, hidden=hidden)
        if _PSK.fullmatch(password):
            return cls(ssid=ssid, password=password.lower(), country=country, hidden=hidden)
        if not 8 <= len(password) <= 63 or not (password.isascii() and password.isprintable()):
            raise ConfigError("--wifi-password-file", "***", "8..63 ASCII characters, or 64 hex digits")
        return cls(ssid=ssid, password=password, country=country, hidden=hidden)

    def __repr__(self) -> str:
        secret = "***" if self.password else ""
        return f"Wifi(ssid={self.ssid!r}, password={secret!r}, country={self.country!r}, hidden={self.hidden})"


class Tls(NamedTuple):
    """PEM texts: the authority, the device's certificate and its key."""

    ca: bytes
    cert: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Tls(ca, cert, key=***)"


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device: its place in the fleet, its network, and the user who may log in (nobody without an ssh key)."""

    agent: str
    cluster: str
    broker: str
    hostname: str
    user: str = "pi"
    ssh_key: str = ""
    wifi: Wifi | None = None

    @classmethod
    def of(
        cls,
        *,
        agent: str,
        cluster: str,
        broker: str,
        hostname: str = "",
        user: str = "pi",
        ssh_key: str = "",
        wifi: Wifi | None = None,
    ) -> "Device":
        """Validate the values and return the device; its host name is by default made from the agent's name.

        Raises:
            ConfigError: a name, address or key is not valid.
        """
        for flag, name in (("--agent", agent), ("--cluster", cluster)):
            if not _NAME.fullmatch(name):
                raise ConfigError(flag, name, "1..64 letters, digits, '.', '_' or '-', first a letter or digit")
        hostname = hostname or re.sub(r"[^A-Za-z0-9-]+", "-", agent).strip("-")[:63].strip("-")
        if not _HOSTNAME.fullmatch(hostname):
            raise ConfigError("--hostname", hostname, "1..63 letters, digits or '-', with '-' neither first nor last")
        if not _USER.fullmatch(user):
            raise ConfigError("--user", user, "a Debian user name: lower-case letters, digits, '_' or '-'")
        if ssh_key and not _KEY.fullmatch(ssh_key):
            raise ConfigError("--ssh-key", "***", "one line with a public key, such as ssh-ed25519 ...")
        address = BrokerUrl.parse(broker, key="--broker")
        if address.password or address.username:
            raise ConfigError(
                "--broker", str(address), "an address without user and password: set them in --config FILE"
            )
        return cls(
            agent=agent, cluster=cluster, broker=broker, hostname=hostname, user=user, ssh_key=ssh_key, wifi=wifi
        )

    @property
    def uses_tls(self) -> bool:
        """Whether its broker uses TLS."""
        return BrokerUrl.parse(self.broker, key="--broker").tls


class PlannedFile(NamedTuple):
    """A file of a payload or card: its path, its bytes or the file that has them, and whether it is secret."""

    path: str
    source: bytes | Path
    secret: bool = False

    def __repr__(self) -> str:
        return f"Part({self.path!r}, {'***' if self.secret else self.size}, secret={self.secret})"

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @property
    def sha256(self) -> str:
        """SHA-256 of the content in hexadecimal."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        with self.source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Payload(NamedTuple):
    """The files of FOLDER, and the digest of their content."""

    parts: tuple[PlannedFile, ...]
    digest: str


def payload(
    device: Device,
    *,
    tls: Tls | None,
    settings: Mapping[str, Any],
    bundle: Iterable[PlannedFile],
    units: Mapping[str, bytes],
    made_s: int,
) -> Payload:
    """Return all files to install on a device.

    `settings` is its configuration file so far; `made_s` is the present time in Unix seconds.

    Raises:
        ConfigError: the broker uses TLS, and no certificate is given.
    """
    if device.uses_tls and tls is None:
        raise ConfigError("--pki", None, f"a PKI folder for {device.broker}, or --cert, --key and --ca given")
    parts = [*bundle]
    has_model = any(part.path.startswith("model/") for part in parts)
    configuration = toml.encode(configured(device, settings, model=MODEL_AT if has_model else "")).encode()
    parts.append(PlannedFile(CONFIGURATION, configuration, secret=True))
    parts.append(PlannedFile(UNIT, units[UNIT]))
    parts.append(PlannedFile(INSTALLER, units[INSTALLER]))
    if tls is not None and device.uses_tls:
        parts.append(PlannedFile("tls/ca.crt", tls.ca))
        parts.append(PlannedFile("tls/client.crt", tls.cert))
        parts.append(PlannedFile("tls/client.key", tls.key, secret=True))
    else:
        parts.append(PlannedFile(PLAIN, units[PLAIN]))
    if {"CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(settings.get("agent", {}).get("providers", ())):
        parts.append(PlannedFile(CUDA, units[CUDA]))
    parts.sort(key=lambda part: part.path)
    sums = "".join(f"{part.sha256}  {part.path}\n" for part in parts).encode()
    digest = hashlib.sha256(sums).hexdigest()[:16]
    parts += [
        PlannedFile(SUMS, sums),
        PlannedFile(IDENTITY, f"{digest}\n".encode()),
        PlannedFile(MADE, f"{made_s}\n".encode()),
    ]
    return Payload(tuple(parts), digest)


def configured(device: Device, settings: Mapping[str, Any], *, model: str = "") -> dict[str, Any]:
    """Return the device's configuration: `settings`, with the device's names and addresses in place of theirs."""
    merged: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()
    }
    own: dict[str, dict[str, str]] = {
        "agent": {"id": device.agent, **({"model": model} if model else {})},
        "broker": {"url": device.broker},
        "cluster": {"name": device.cluster},
    }
    for section, keys in own.items():
        merged[section] = {**merged.get(section, {}), **keys}
    return merged
