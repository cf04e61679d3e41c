"""What an authority issued: to whom, in which role, for which clusters, until when, and what it took back.

One JSON file in the PKI folder, the source of the revocation list and of the brokers' access rights. Times are UTC.
"""

import difflib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

import msgspec

from fedhlm.protocol.messages import Name
from fedhlm_fleet.pki import files
from fedhlm_fleet.pki.files import PkiError
from fedhlm_fleet.pki.roles import CertificateRole

FILE: Final = "registry.json"
EXPIRING: Final = timedelta(days=30)

State = Literal["valid", "expiring", "expired", "revoked"]
_VERSION: Final = 1


class Issued(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One certificate; the serial number in hexadecimal."""

    serial: str
    not_before: datetime
    not_after: datetime
    revoked: datetime | None = None

    def state(self, now: datetime) -> State:
        """What it is worth at a moment."""
        if self.revoked is not None:
            return "revoked"
        if now >= self.not_after:
            return "expired"
        return "expiring" if now >= self.not_after - EXPIRING else "valid"


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A party and its certificates, oldest first. Without clusters it belongs to none, or as a client to all."""

    name: Name
    role: CertificateRole
    clusters: tuple[Name, ...] = ()
    hosts: tuple[str, ...] = ()
    certificates: tuple[Issued, ...]

    @property
    def newest(self) -> Issued:
        """The certificate whose files lie in issued/NAME."""
        return self.certificates[-1]

    def usable(self, now: datetime) -> tuple[Issued, ...]:
        """The certificates that brokers still take."""
        return tuple(c for c in self.certificates if c.state(now) in ("valid", "expiring"))


class Registry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All entries by name; `crl_number` grows with every revocation list."""

    # No defaults: what is not in a file is missing.
    version: int
    crl_number: int
    entries: dict[str, Entry]

    @classmethod
    def empty(cls) -> "Registry":
        """Nothing issued yet."""
        return cls(version=_VERSION, crl_number=0, entries={})

    @classmethod
    def load(cls, folder: Path) -> "Registry":
        """Raises PkiError: it is absent, or was not written by `save`."""
        path = folder / FILE
        try:
            registry = msgspec.json.decode(files.read(path, "the registry"), type=Registry)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise PkiError(f"{path} is garbled ({exc}): restore it, as it says who has been revoked") from exc
        if registry.version != _VERSION:
            raise PkiError(f"version of {path} must be {_VERSION} (got {registry.version})")
        wrong = [name for name, entry in registry.entries.items() if name != entry.name or not entry.certificates]
        if wrong:
            raise PkiError(f"entry {wrong[0]!r} of {path} must be given its own name and at least one certificate")
        return registry

    def save(self, folder: Path) -> None:
        """Replace the file as a whole."""
        files.write(folder / FILE, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    def with_entry(self, entry: Entry) -> "Registry":
        """A copy with one entry added or replaced."""
        return msgspec.structs.replace(self, entries={**self.entries, entry.name: entry})

    def entry(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            PkiError: nothing was issued to it.
        """
        if name in self.entries:
            return self.entries[name]
        near = difflib.get_close_matches(name, self.entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`fedhlm pki list` shows the names"
        raise PkiError(f"nothing was issued to {name!r}: {hint}")


def utc(moment: datetime) -> datetime:
    """A moment in UTC without fractions of a second, as certificates hold it."""
    return moment.astimezone(UTC).replace(microsecond=0)
