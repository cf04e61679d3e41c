"""The registry of an authority: to whom it issued certificates, their roles, clusters and end dates, and revocations.

It is one JSON file in the PKI folder, from which the revocation list and the brokers' access rules are made. Times are
UTC.
"""

import difflib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

import msgspec

from fedhlm.protocol.fields import Name
from fedhlm_fleet.pki import files
from fedhlm_fleet.pki.files import PkiError
from fedhlm_fleet.pki.roles import CertificateRole

FILE: Final = "registry.json"
EXPIRING: Final = timedelta(days=30)

State = Literal["valid", "expiring", "expired", "revoked"]
_VERSION: Final = 1


class Issued(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One certificate; `serial` is hexadecimal."""

    serial: str
    not_before: datetime
    not_after: datetime
    revoked: datetime | None = None

    def state(self, now: datetime) -> State:
        """Return the state of the certificate at a time."""
        if self.revoked is not None:
            return "revoked"
        if now >= self.not_after:
            return "expired"
        return "expiring" if now >= self.not_after - EXPIRING else "valid"


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A party and its certificates, oldest first. A client without clusters belongs to all."""

    name: Name
    role: CertificateRole
    clusters: tuple[Name, ...] = ()
    hosts: tuple[str, ...] = ()
    certificates: tuple[Issued, ...]

    @property
    def newest(self) -> Issued:
        """The certificate whose files are in issued/NAME."""
        return self.certificates[-1]

    def usable(self, now: datetime) -> tuple[Issued, ...]:
        """Return the certificates that brokers still accept."""
        return tuple(c for c in self.certificates if c.state(now) in ("valid", "expiring"))


class Registry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All entries by name; `crl_number` grows with every revocation list."""

    # There are no defaults: a field that is missing in the file is an error.
    version: int
    crl_number: int
    entries: dict[str, Entry]

    @classmethod
    def empty(cls) -> "Registry":
        """Return a registry without entries."""
        return cls(version=_VERSION, crl_number=0, entries={})

    @classmethod
    def load(cls, folder: Path) -> "Registry":
        """Read the registry of a folder.

        Raises:
            PkiError: the file is missing, or was not written by `save`.
        """
        path = folder / FILE
        try:
            registry = msgspec.json.decode(files.read(path, "the registry"), type=Registry)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise PkiError(f"{path} must be a registry ({exc}): restore it, as it lists revocations") from exc
        if registry.version != _VERSION:
            raise PkiError(f"version of {path} must be {_VERSION} (got {registry.version})")
        wrong = [name for name, entry in registry.entries.items() if name != entry.name or not entry.certificates]
        if wrong:
            raise PkiError(f"entry {wrong[0]!r} of {path} must be given its own name and at least one certificate")
        return registry

    def save(self, folder: Path) -> None:
        """Replace the file atomically."""
        files.write(folder / FILE, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    def with_entry(self, entry: Entry) -> "Registry":
        """Return a copy with one entry added or replaced."""
        return msgspec.structs.replace(self, entries={**self.entries, entry.name: entry})

    def entry(self, name: str) -> Entry:
        """Return the entry of a name.

        Raises:
            PkiError: nothing was issued to the name.
        """
        if name in self.entries:
            return self.entries[name]
        near = difflib.get_close_matches(name, self.entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`fedhlm pki list` shows the names"
        raise PkiError(f"nothing was issued to {name!r}: {hint}")


def utc(moment: datetime) -> datetime:
    """Convert a time to UTC without fractions of a second, as certificates store it."""
    return moment.astimezone(UTC).replace(microsecond=0)
