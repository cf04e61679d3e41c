"""A mosquitto broker that trusts one PKI: its configuration, access rules and certificates in one folder.

After a change the folder is written again, and the broker reloads it on SIGHUP. The plain variant is for development:
it has no TLS and no access rules, and by default only this machine can reach it.
"""

from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from fedhlm.bus.dial import MAX_IN_FLIGHT
from fedhlm.bus.interface import DEFAULT_MAX_INCOMING
from fedhlm.errors import ConfigError
from fedhlm.process.files import PRIVATE
from fedhlm.protocol.fields import MAX_BATCH_BYTES
from fedhlm.protocol.topics import DEFAULT_ROOT
from fedhlm_fleet.pki import files
from fedhlm_fleet.pki.acl import BrokerPlace, Kind, acl, described
from fedhlm_fleet.pki.authority import CA_CERT, CRL, ISSUED, ca_certificate, renew_crl
from fedhlm_fleet.pki.files import PkiError
from fedhlm_fleet.pki.registry import Entry, Registry
from fedhlm_fleet.pki.roles import CERTIFICATES

CONFIGURATION: Final = "mosquitto.conf"
ACL: Final = "acl"
CERT: Final = "broker.crt"
KEY: Final = "broker.key"

DATA: Final = "/var/lib/mosquitto/"


class BrokerLimits(NamedTuple):
    """Limits of one broker in bytes: its largest packet, the queue for one client, and all of its memory."""

    packet_bytes: int
    queued_bytes: int
    memory_bytes: int


# Room for topic, properties and packet header.
_HEAD: Final = 128 * 1024
_MIB: Final = 1024 * 1024
# mosquitto queues messages of QoS 0 for a client that does not read without any other bound than its memory. The memory
# is that of the containers in docker-compose.yml, less what the program itself takes.
# The largest packet in a cluster is the text of a request or a block with draft laws; towards the cloud, a batch of
# blocks.
LIMITS: Final[dict[Kind, BrokerLimits]] = {
    "cluster": BrokerLimits(2 * _MIB + _HEAD, 8 * _MIB, 96 * _MIB),
    "cloud": BrokerLimits(MAX_BATCH_BYTES + _HEAD, 32 * _MIB, 256 * _MIB),
    "shared": BrokerLimits(MAX_BATCH_BYTES + _HEAD, 16 * _MIB, 256 * _MIB),
}


class Listener(NamedTuple):
    """Where the broker listens and keeps its state; `at` is the path of its folder as the broker sees it."""

    port: int
    bind: str = ""
    at: str = ""
    data: str = DATA


def configure(
    folder: Path,
    out: Path,
    *,
    place: BrokerPlace,
    listener: Listener,
    broker: str | None = None,
    root: str = DEFAULT_ROOT,
    now: datetime,
) -> Entry:
    """Write the configuration of a broker, with all files that it needs, to `out`; return the broker's entry.

    The revocation list is renewed first. `broker` names the certificate; by default it is the one issued for this
    place.

    Raises:
        PkiError: no certificate or several were issued for this broker, or its files or the CA cannot be used.
        ConfigError: the root or a path cannot stand in a configuration.
    """
    registry = Registry.load(folder)
    entry = _broker_of(registry, place, broker, now)
    rights = acl(registry.entries.values(), place, root)
    text = _secured(place, listener, out)
    home = folder / ISSUED / entry.name
    cert = files.read(home / f"{entry.name}.crt", "the broker's certificate")
    key = files.read(home / f"{entry.name}.key", "the broker's key")
    ca_certificate(folder)
    renew_crl(folder, now=now)
    files.write(out / KEY, key, mode=PRIVATE)
    files.write(out / CERT, cert)
    for name in (CA_CERT, CRL):
        files.write(out / name, files.read(folder / name, "the PKI's"))
    files.write(out / ACL, rights.encode())
    files.write(out / CONFIGURATION, text.encode())
    return entry


def configure_plain(out: Path, *, listener: Listener) -> None:
    """Write a mosquitto.conf without TLS and access rules.

    Raises:
        PkiError: the file cannot be written.
        ConfigError: a path cannot stand in a configuration.
    """
    head = ["# Made by `fedhlm pki mosquitto --plain`, for development: everybody on this port has all rights."]
    lines = [*head, f"listener {listener.port} {listener.bind or '127.0.0.1'}", "allow_anonymous true"]
    files.write(out / CONFIGURATION, "\n".join([*lines, *_limits(listener, "shared"), ""]).encode())


def _secured(place: BrokerPlace, listener: Listener, out: Path) -> str:
    at = _plain_path("--at", listener.at or str(out.resolve())).rstrip("/")
    return "\n".join(
        [
            f"# Made by `fedhlm pki mosquitto`, for {described(place)}.",
            f"listener {listener.port}{f' {listener.bind}' if listener.bind else ''}",
            f"cafile {at}/{CA_CERT}",
            f"certfile {at}/{CERT}",
            f"keyfile {at}/{KEY}",
            f"crlfile {at}/{CRL}",
            "tls_version tlsv1.3",
            "require_certificate true",
            "allow_anonymous false",
            "# The certificate's common name is the party; no party can take over another one's connection.",
            "use_identity_as_username true",
            "use_username_as_clientid true",
            f"acl_file {at}/{ACL}",
            *_limits(listener, place.kind),
            "",
        ]
    )


def _limits(listener: Listener, kind: Kind) -> list[str]:
    data = _plain_path("--data", listener.data).rstrip("/")
    limits = LIMITS[kind]
    return [
        "# No part sends larger packets. The queue limits hold for each client, the memory limit for the whole broker.",
        f"max_packet_size {limits.packet_bytes}",
        f"max_inflight_messages {MAX_IN_FLIGHT}",
        f"max_queued_messages {DEFAULT_MAX_INCOMING}",
        f"max_queued_bytes {limits.queued_bytes}",
        f"memory_limit {limits.memory_bytes}",
        "set_tcp_nodelay true",
        "# Retained messages survive a restart of the broker.",
        "persistence true",
        f"persistence_location {data}/",
        "autosave_interval 300",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_type information",
    ]


def _plain_path(key: str, path: str) -> str:
    if not path.startswith("/") or any(c.isspace() or not c.isprintable() for c in path):
        raise ConfigError(key, path, "an absolute path without spaces, as mosquitto.conf has no quotes")
    return path


def _broker_of(registry: Registry, place: BrokerPlace, name: str | None, now: datetime) -> Entry:
    if name is not None:
        entry = registry.entry(name)
        if not CERTIFICATES[entry.role].listens:
            raise PkiError(f"the certificate must be of a broker (got {name!r} of role {entry.role})")
        found = [entry]
    else:
        wanted = (place.cluster,) if place.cluster else ()
        found = [
            e
            for e in registry.entries.values()
            if CERTIFICATES[e.role].listens and e.clusters == wanted and e.usable(now)
        ]
    if len(found) > 1:
        raise PkiError(
            f"--broker must be one of {', '.join(e.name for e in found)}, since several were issued for {described(place)} (got nothing)"
        )
    if not found:
        flags = (
            f"broker-{place.cluster} --role broker --cluster {place.cluster}"
            if place.cluster
            else "broker --role broker"
        )
        raise PkiError(f"no broker was issued for {described(place)}: fedhlm pki issue {flags} --dns HOST")
    if found[0].newest.state(now) in ("expired", "revoked"):
        raise PkiError(
            f"the certificate of {found[0].name!r} must be valid (got one that is {found[0].newest.state(now)}): issue it with --renew"
        )
    return found[0]
