"""The certificate of a device, always validated: from a PKI folder, which issues it if needed, or from three files."""

from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from fedhlm_fleet.flash.plan import FlashError, Tls
from fedhlm_fleet.pki import authority
from fedhlm_fleet.pki.registry import Registry
from fedhlm_fleet.pki.roles import CERTIFICATES


def from_pki(folder: Path, agent: str, cluster: str, *, now: datetime, issue: bool = True) -> Tls | None:
    """Return the agent's certificate. If there is none, issue a new one, or without `issue` return None.

    Raises:
        PkiError: the folder is not a PKI, or cannot issue certificates.
        FlashError: the agent's certificate has another role or cluster, or is revoked or expired.
    """
    authority.ca_certificate(folder)
    entry = Registry.load(folder).entries.get(agent)
    if entry is None:
        if not issue:
            return None
        authority.issue(folder, agent, role="agent", clusters=(cluster,), now=now)
    elif not CERTIFICATES[entry.role].party.drafts or cluster not in entry.clusters:
        raise FlashError(
            f"{agent!r} in {folder} must be an agent of {cluster} "
            f"(got {entry.role} of {', '.join(entry.clusters) or 'no cluster'}): fedhlm pki issue {agent} --renew, or another name"
        )
    elif not entry.usable(now):
        raise FlashError(f"the certificate of {agent!r} is expired or revoked: fedhlm pki issue {agent} --renew")
    home = folder / authority.ISSUED / agent
    return from_files(home / f"{agent}.crt", home / f"{agent}.key", home / authority.CA_CERT, agent=agent, now=now)


def from_files(cert: Path, key: Path, ca: Path, *, agent: str, now: datetime) -> Tls:
    """Read three PEM files, and check that they belong together and to this agent, and are valid at `now`.

    Raises:
        FlashError: the message names the file and its problem.
    """
    texts = []
    for path in (ca, cert, key):
        try:
            texts.append(path.read_bytes())
        except OSError as exc:
            raise FlashError(f"cannot read {path}: {exc.strerror or exc}") from exc
    try:
        certificate = x509.load_pem_x509_certificate(texts[1])
        issuer = x509.load_pem_x509_certificate(texts[0])
    except ValueError as exc:
        raise FlashError(f"{cert} and {ca} must be certificates in PEM") from exc
    try:
        private = serialization.load_pem_private_key(texts[2], password=None)
    except (ValueError, TypeError) as exc:
        raise FlashError(f"{key} must be a private key in PEM without a password") from exc
    names = [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [agent]:
        raise FlashError(f"{cert} must be the certificate of {agent} (got that of {', '.join(names) or 'nobody'})")
    if private.public_key() != certificate.public_key():
        raise FlashError(f"{key} is not the key of {cert}")
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception as exc:  # the library raises ValueError, TypeError and InvalidSignature, which share no base
        raise FlashError(f"{cert} was not made by {ca}") from exc
    if not certificate.not_valid_before_utc <= now + timedelta(minutes=5) or certificate.not_valid_after_utc <= now:
        raise FlashError(f"{cert} is good until {certificate.not_valid_after_utc:%Y-%m-%d}: fedhlm pki issue --renew")
    return Tls(*texts)
