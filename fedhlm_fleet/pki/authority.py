"""A certificate authority (CA) in a folder: create it, and issue, renew and revoke certificates.

Keys are ECDSA on P-256. The CA may sign certificates and revocation lists, but no other CA. A certificate enters the
registry before its files are written. So every certificate that could reach a broker can be revoked, even after a
crash.
"""

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedhlm.errors import ConfigError
from fedhlm.process.files import PRIVATE
from fedhlm.protocol.fields import NAME_PATTERN
from fedhlm.protocol.roles import EDGE_PREFIX, reserved
from fedhlm_fleet.pki import files
from fedhlm_fleet.pki.files import PkiError
from fedhlm_fleet.pki.registry import FILE, Entry, Issued, Registry, utc
from fedhlm_fleet.pki.roles import CERTIFICATES, CertificateRole

CA_CERT: Final = "ca.crt"
CA_KEY: Final = "ca.key"
CRL: Final = "crl.pem"
ISSUED: Final = "issued"

CA_DAYS: Final = 3_650
LEAF_DAYS: Final = 365
# Brokers reject everybody once their list has expired. It outlasts certificates of a year: whoever renews those in time
# has made a new list.
CRL_DAYS: Final = 400
# The clock of a device without a battery may be a day late.
BACKDATED: Final = timedelta(days=1)

_HOST: Final = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


class Made(NamedTuple):
    """The files of one party, and its entry in the registry. `clipped`: the CA expires before the requested end."""

    entry: Entry
    ca: Path
    cert: Path
    key: Path
    former: tuple[Issued, ...]
    clipped: bool


class _Signer(NamedTuple):
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def create(folder: Path, *, days: int = CA_DAYS, name: str = "fedhlm CA", now: datetime) -> bool:
    """Create a CA, an empty registry and an empty revocation list; change nothing and return False if a CA exists.

    Raises:
        PkiError: the folder contains an incomplete CA, or it cannot be written.
    """
    with files.locked(folder):
        if (folder / CA_CERT).exists():
            signer = _signer(folder, now)
            if not (folder / CRL).exists():
                _publish_crl(folder, signer, Registry.load(folder), now)
            Registry.load(folder)
            return False
        if (folder / FILE).exists() and Registry.load(folder).entries:
            raise PkiError(
                f"{folder} has a registry and no {CA_CERT}: restore {CA_CERT} and {CA_KEY}, or use another folder"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(subject, subject, key.public_key(), now - BACKDATED, now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        files.write(folder / CA_KEY, _pem_of(key), mode=PRIVATE)
        _publish_crl(folder, _Signer(certificate, key), Registry.empty(), now)
        # The certificate is written last: its presence means that the CA is complete.
        files.write(folder / CA_CERT, certificate.public_bytes(serialization.Encoding.PEM))
        return True


def issue(
    folder: Path,
    name: str,
    *,
    role: CertificateRole | None = None,
    clusters: Sequence[str] = (),
    hosts: Sequence[str] = (),
    days: int = LEAF_DAYS,
    renew: bool = False,
    now: datetime,
) -> Made:
    """Issue a key and a certificate for a party, in issued/NAME.

    `renew` replaces the party's certificate, and keeps the values that are not given. The former certificates stay
    valid until they expire or are revoked. A name whose newest certificate is revoked can be issued again without
    `renew`.

    Raises:
        ConfigError: the name, role, a cluster or a host is not valid.
        PkiError: the name is taken (without `renew`) or unknown (with it), or the CA is missing, expired or unreadable.
    """
    with files.locked(folder):
        signer = _signer(folder, now)
        registry = Registry.load(folder)
        former = registry.entry(name) if renew else registry.entries.get(name)
        if former is not None and not renew and former.newest.revoked is None:
            raise PkiError(
                f"{name!r} was issued already as {former.role}, until {former.newest.not_after:%Y-%m-%d}: "
                "--renew replaces its certificate"
            )
        if former is not None and renew:
            role, clusters, hosts = role or former.role, clusters or former.clusters, hosts or former.hosts
        if role is None:
            raise ConfigError("--role", None, f"the role of {name!r}")
        if former is not None and role != former.role and former.usable(now):
            raise ConfigError(
                "--role", role, f"{name!r} is {former.role} in a certificate that is still good: revoke it"
            )
        clusters = _checked(name, role, tuple(dict.fromkeys(clusters)), tuple(hosts))
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _leaf(signer, name, role, hosts, key.public_key(), now, now + timedelta(days=days))
        issued = Issued(
            serial=f"{certificate.serial_number:x}",
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )
        kept = former.certificates if former is not None else ()
        entry = Entry(name=name, role=role, clusters=clusters, hosts=tuple(hosts), certificates=(*kept, issued))
        registry.with_entry(entry).save(folder)
        home = folder / ISSUED / name
        made = Made(
            entry,
            home / CA_CERT,
            home / f"{name}.crt",
            home / f"{name}.key",
            former.usable(now) if former is not None else (),
            issued.not_after < utc(now + timedelta(days=days)),
        )
        files.write(made.ca, signer.certificate.public_bytes(serialization.Encoding.PEM))
        files.write(made.key, _pem_of(key), mode=PRIVATE)
        files.write(made.cert, certificate.public_bytes(serialization.Encoding.PEM))
        return made


def revoke(folder: Path, name: str, *, superseded: bool = False, now: datetime) -> tuple[Issued, ...]:
    """Revoke all certificates of a name, or all but the newest, and return those that were not revoked before.

    The revocation list is renewed in any case.

    Raises:
        PkiError: nothing was issued to the name, or the CA is missing, expired or unreadable.
    """
    with files.locked(folder):
        signer = _signer(folder, now)
        registry = Registry.load(folder)
        entry = registry.entry(name)
        doomed = [c for c in (entry.certificates[:-1] if superseded else entry.certificates) if c.revoked is None]
        moment = utc(now)
        certificates = tuple(
            msgspec.structs.replace(c, revoked=moment) if c in doomed else c for c in entry.certificates
        )
        registry = registry.with_entry(msgspec.structs.replace(entry, certificates=certificates))
        _publish_crl(folder, signer, registry, now)
        return tuple(doomed)


def renew_crl(folder: Path, *, now: datetime) -> datetime:
    """Renew the revocation list, and return the time at which it expires.

    Raises:
        PkiError: the CA is missing, expired or unreadable.
    """
    with files.locked(folder):
        return _publish_crl(folder, _signer(folder, now), Registry.load(folder), now)


def crl_until(folder: Path) -> datetime:
    """Return the time at which the present revocation list expires.

    Raises:
        PkiError: the list is missing or malformed.
    """
    path = folder / CRL
    try:
        until = x509.load_pem_x509_crl(files.read(path, "the revocation list")).next_update_utc
    except ValueError as exc:
        raise PkiError(f"{path} must be a revocation list ({exc}); `fedhlm pki crl` writes it anew") from exc
    if until is None:
        raise PkiError(f"{path} must be a revocation list with an end; `fedhlm pki crl` writes it anew")
    return until


def ca_certificate(folder: Path) -> x509.Certificate:
    """Return the CA's certificate.

    Raises:
        PkiError: the certificate is missing or malformed.
    """
    path = folder / CA_CERT
    if not path.exists():
        raise PkiError(f"{folder} must hold {CA_CERT}: `fedhlm pki init {folder}` makes a CA")
    try:
        return x509.load_pem_x509_certificate(files.read(path, "the CA's certificate"))
    except ValueError as exc:
        raise PkiError(f"{path} must be a PEM certificate ({exc})") from exc


def _signer(folder: Path, now: datetime) -> _Signer:
    certificate = ca_certificate(folder)
    if now >= certificate.not_valid_after_utc:
        raise PkiError(
            f"the CA in {folder} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: make one in another folder"
        )
    if now < certificate.not_valid_before_utc:
        begin = certificate.not_valid_before_utc
        raise PkiError(
            f"the CA in {folder} is good from {begin:%Y-%m-%d} on, and it is {now:%Y-%m-%d} here: set the clock"
        )
    path = folder / CA_KEY
    try:
        key = serialization.load_pem_private_key(files.read(path, "the CA's key"), password=None)
    except (ValueError, TypeError) as exc:
        raise PkiError(f"{path} must be an unencrypted PEM key ({exc})") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise PkiError(f"{path} is not the key of {folder / CA_CERT}")
    return _Signer(certificate, key)


def _checked(name: str, role: CertificateRole, clusters: tuple[str, ...], hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Validate the name, role, clusters and hosts of a party, and return its clusters."""
    for key, value in (("NAME", name), *(("--cluster", cluster) for cluster in clusters)):
        if not re.fullmatch(NAME_PATTERN, value):
            raise ConfigError(key, value, "1..64 letters, digits, '.', '_' or '-', beginning with a letter or digit")
    traits = CERTIFICATES[role]
    fewest, most = traits.clusters
    if traits.party.relays and not clusters and name.startswith(EDGE_PREFIX):
        clusters = (name.removeprefix(EDGE_PREFIX),)
    if len(clusters) < fewest:
        raise ConfigError("--cluster", "", f"the cluster of the {role} {name!r}")
    if most is not None and len(clusters) > most:
        expected = f"left out, since the {role} {name!r} belongs to all clusters"
        raise ConfigError("--cluster", " ".join(clusters), f"one cluster for the {role} {name!r}" if most else expected)
    # These are the names of the parts themselves: nobody else may be mistaken for them.
    proper = traits.party.proper.format(cluster="".join(clusters[:1]))
    if proper and name != proper:
        raise ConfigError("NAME", name, f"{proper!r} for this {role}")
    if not proper and reserved(name):
        raise ConfigError("NAME", name, f"another name for role {role}, since this one is that of a cloud or an edge")
    if traits.listens and not hosts:
        raise ConfigError("--dns", "", f"the host names or addresses by which parties reach the broker {name!r}")
    if hosts and not traits.listens:
        raise ConfigError(
            "--dns", " ".join(hosts), f"left out for {name!r} of role {role}, since only brokers have host names"
        )
    for host in hosts:
        _general_name(host)
    return clusters


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    # Whoever verifies the name would take one whose last label consists of digits for an address.
    if _HOST.fullmatch(host) is None or host.rpartition(".")[2].isdigit():
        raise ConfigError("--dns", host, "a host name or IP address")
    return x509.DNSName(host)


def _leaf(
    signer: _Signer,
    name: str,
    role: CertificateRole,
    hosts: Sequence[str],
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    until: datetime,
) -> x509.Certificate:
    ca = signer.certificate
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if CERTIFICATES[role].listens else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            ca.subject,
            key,
            max(now - BACKDATED, ca.not_valid_before_utc),
            min(until, ca.not_valid_after_utc),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer.key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc(begin))
        .not_valid_after(utc(end))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _publish_crl(folder: Path, signer: _Signer, registry: Registry, now: datetime) -> datetime:
    """Save the registry with the next number, then the revocation list made from it; return when the list expires."""
    registry = msgspec.structs.replace(registry, crl_number=registry.crl_number + 1)
    registry.save(folder)
    until = utc(now + timedelta(days=CRL_DAYS))
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(utc(now - BACKDATED))
        .next_update(until)
        .add_extension(x509.CRLNumber(registry.crl_number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
    )
    for entry in registry.entries.values():
        for certificate in entry.certificates:
            if certificate.revoked is not None:
                revoked = x509.RevokedCertificateBuilder().serial_number(int(certificate.serial, 16))
                builder = builder.add_revoked_certificate(revoked.revocation_date(certificate.revoked).build())
    crl = builder.sign(signer.key, hashes.SHA256())
    files.write(folder / CRL, crl.public_bytes(serialization.Encoding.PEM))
    return until


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
