"""`python -m fedhlm_fleet.container.init`: certificates and broker configurations for the containers of one machine.

The mounted volumes decide which parties get files: PARTS/agents/CLUSTER/NAME, PARTS/edges/CLUSTER,
PARTS/clients/CLUSTER/NAME, PARTS/observers/NAME, PARTS/brokers/CLUSTER, PARTS/cloud and PARTS/cloud-broker. Each is one volume and receives
the files of that party only. A second run issues missing certificates, renews those that expire soon, and leaves the
others; revoked parties get none.
"""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from fedhlm.errors import FedhlmError
from fedhlm.process.files import PRIVATE, PUBLIC, replace_file
from fedhlm.protocol.topics import DEFAULT_ROOT
from fedhlm_fleet.pki import authority, mosquitto
from fedhlm_fleet.pki.acl import BrokerPlace
from fedhlm_fleet.pki.files import PkiError
from fedhlm_fleet.pki.registry import EXPIRING, Registry
from fedhlm_fleet.pki.roles import CERTIFICATES, CertificateRole

CERT: Final = "party.crt"
KEY: Final = "party.key"
API_KEYS: Final = "api.keys"
API_CLIENT: Final = "host"
PROBE_CERT: Final = "probe.crt"
PROBE_KEY: Final = "probe.key"
# A broker's health check connects as a client of a cluster that does not exist, so it has no rights.
NOWHERE: Final = "nowhere"
# No image has this folder: the container engine would copy its owner and files into the new volume.
CONFIG_AT: Final = "/etc/fedhlm/broker"
DATA_AT: Final = "/mosquitto/data"


class Recipient(NamedTuple):
    """A party that gets a key, and the folder (one volume) that receives it; brokers also have a place."""

    folder: Path
    name: str
    role: CertificateRole
    clusters: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    place: BrokerPlace | None = None


class Owners(NamedTuple):
    """User ids that the containers run as."""

    part: int
    broker: int


def plan(parts: Path) -> Iterator[Recipient]:
    """Yield the parties for which there are folders, in a fixed order."""
    for folder in _folders(parts / "brokers"):
        name = f"broker-{folder.name}"
        yield Recipient(
            folder, name, "broker", (folder.name,), (name, "localhost"), BrokerPlace("cluster", folder.name)
        )
    if (parts / "cloud-broker").is_dir():
        hosts = ("broker-cloud", "localhost")
        yield Recipient(parts / "cloud-broker", "broker-cloud", "broker", (), hosts, BrokerPlace("cloud"))
    if (parts / "cloud").is_dir():
        yield Recipient(parts / "cloud", "cloud", "cloud")
    for folder in _folders(parts / "edges"):
        yield Recipient(folder, f"edge-{folder.name}", "edge", (folder.name,))
    for folder in _folders(parts / "observers"):
        yield Recipient(folder, folder.name, "observer")
    of_role: tuple[tuple[str, CertificateRole], ...] = (("agents", "agent"), ("clients", "client"))
    for kind, role in of_role:
        for cluster in _folders(parts / kind):
            for folder in _folders(cluster):
                yield Recipient(folder, folder.name, role, (cluster.name,))


def provide(
    pki: Path, parts: Path, *, owners: Owners, port: int, root: str = DEFAULT_ROOT, now: datetime
) -> Iterator[str]:
    """Issue and deliver all certificates and broker configurations; yield one line for each party.

    Raises:
        FedhlmError: the PKI or a folder cannot be used.
    """
    made = authority.create(pki, now=now)
    yield f"{'made' if made else 'using'} the CA in {pki}"
    parties = list(plan(parts))
    told = {party.name: _issued(pki, party, now) for party in parties}
    brokers = [party for party in parties if party.place is not None]
    for broker in brokers:
        _issued(pki, _probe(broker), now)
    # Brokers come last: their access rules name every party that has a certificate.
    for party in (*(p for p in parties if p.place is None), *brokers):
        if party.place is None:
            _deliver(_pair(pki, party.name, CERT, KEY), party.folder, owners.part)
            _make_api_key(party, owners.part)
        else:
            _deliver_broker(pki, party, party.place, owners.broker, port=port, root=root, now=now)
        yield f"{party.name}: {told[party.name]}"


def provide_plain(parts: Path, *, owners: Owners, port: int) -> Iterator[str]:
    """Configure brokers without certificates and access rules, for development; yield one line for each.

    The APIs of agents still need a key.
    """
    for party in plan(parts):
        _make_api_key(party, owners.part)
        if party.place is not None:
            # Only the other containers can reach this address: the containers' network is closed.
            listener = mosquitto.Listener(port, "0.0.0.0", CONFIG_AT, DATA_AT)  # noqa: S104
            with tempfile.TemporaryDirectory() as staging:
                mosquitto.configure_plain(Path(staging), listener=listener)
                _deliver({path.name: path for path in Path(staging).iterdir()}, party.folder, owners.broker)
            yield f"{party.name}: no TLS, everybody may do everything"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code: 0, or 2 if a folder or the PKI cannot be used."""
    parser = argparse.ArgumentParser(prog="init", description="Certificates for the containers of one machine.")
    parser.add_argument("--pki", type=Path, default=Path("/pki"), help="folder of the CA")
    parser.add_argument("--parts", type=Path, default=Path("/parts"), help="folder where the volumes are mounted")
    parser.add_argument("--part-user", type=int, default=10001, help="user id that owns the parts' files")
    parser.add_argument("--broker-user", type=int, default=1883, help="user id that owns the brokers' files")
    parser.add_argument("--root", default=DEFAULT_ROOT, help="first levels of all topics")
    parser.add_argument("--plain", action="store_true", help="no TLS, for development")
    given = parser.parse_args(arguments)
    owners = Owners(given.part_user, given.broker_user)
    try:
        if given.plain:
            lines = provide_plain(given.parts, owners=owners, port=1883)
        else:
            now = datetime.now(UTC)
            lines = provide(given.pki, given.parts, owners=owners, port=8883, root=given.root, now=now)
        for line in lines:
            print(line)
    except FedhlmError as exc:
        print(f"init: {exc}", file=sys.stderr)
        return 2
    return 0


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _probe(broker: Recipient) -> Recipient:
    return Recipient(broker.folder, f"probe-{broker.name}", "client", (NOWHERE,))


def _issued(pki: Path, party: Recipient, now: datetime) -> str:
    """Make sure that a party has a certificate that does not expire soon, and return what was done."""
    entry = Registry.load(pki).entries.get(party.name)
    if entry is not None and entry.role != party.role:
        raise PkiError(
            f"the role of {party.name!r} must be {party.role} (got {entry.role}): give one of them another name"
        )
    if entry is not None and entry.newest.revoked is not None:
        return "remains revoked; `fedhlm pki issue` gives it a new certificate"
    if entry is not None and entry.newest.not_after - now > EXPIRING:
        return f"good until {entry.newest.not_after:%Y-%m-%d}"
    # An operator may have added host names to a broker by hand; a renewal keeps them.
    made = (
        authority.issue(pki, party.name, renew=True, now=now)
        if entry is not None
        else authority.issue(pki, party.name, role=party.role, clusters=party.clusters, hosts=party.hosts, now=now)
    )
    return f"{'renewed' if entry else 'issued'} until {made.entry.newest.not_after:%Y-%m-%d}"


def _pair(pki: Path, name: str, cert: str, key: str) -> dict[str, Path]:
    home = pki / authority.ISSUED / name
    return {authority.CA_CERT: pki / authority.CA_CERT, cert: home / f"{name}.crt", key: home / f"{name}.key"}


def _deliver_broker(
    pki: Path, party: Recipient, place: BrokerPlace, owner: int, *, port: int, root: str, now: datetime
) -> None:
    with tempfile.TemporaryDirectory() as staging:
        listener = mosquitto.Listener(port, "", CONFIG_AT, DATA_AT)
        mosquitto.configure(pki, Path(staging), place=place, listener=listener, broker=party.name, root=root, now=now)
        made = {path.name: path for path in Path(staging).iterdir()}
        _deliver(made | _pair(pki, _probe(party).name, PROBE_CERT, PROBE_KEY), party.folder, owner)


def _make_api_key(party: Recipient, owner: int) -> None:
    """Make the file of API keys of an agent, unless there is one."""
    if not CERTIFICATES[party.role].party.drafts:
        return
    path = party.folder / API_KEYS
    try:
        if not path.exists():
            replace_file(path, f"{API_CLIENT} {secrets.token_hex(16)}\n".encode(), mode=PRIVATE, owner=owner)
    except OSError as exc:
        raise PkiError(f"cannot write {path}: {exc.strerror or exc}") from exc


def _deliver(sources: dict[str, Path], folder: Path, owner: int) -> None:
    """Copy files; only the owner can read a key. A file gets its name once its content and owner are set."""
    for name, source in sources.items():
        mode = PRIVATE if name.endswith(".key") else PUBLIC
        try:
            replace_file(folder / name, source.read_bytes(), mode=mode, owner=owner)
        except OSError as exc:
            raise PkiError(f"cannot copy {source} to {folder / name}: {exc.strerror or exc}") from exc


if __name__ == "__main__":
    sys.exit(main())
