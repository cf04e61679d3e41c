"""`fedhlm pki`: the command line of fedhlm_fleet.pki; it prints what was made, where it is, and what to do next."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cyclopts import App, Parameter

from fedhlm.errors import ConfigError
from fedhlm_fleet.commands import federation
from fedhlm_fleet.commands.common import Keys, needing, print_facts
from fedhlm_fleet.commands.mistakes import Between
from fedhlm_fleet.pki.roles import CERTIFICATES, CertificateRole

if TYPE_CHECKING:
    from fedhlm_fleet.pki.acl import BrokerPlace
    from fedhlm_fleet.pki.authority import Made

Many = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Days = Annotated[int, Parameter(validator=Between(gte=1, lte=36_500))]
Port = Annotated[int | None, Parameter(validator=Between(gte=1, lte=65_535))]
PKI: Final = Path("pki")

app = App(name="pki", help="Issue certificates for a fleet, and configure brokers that trust them.")


@app.command
def init(folder: Path = PKI, /, *, days: Days = 3_650, name: str = "fedhlm CA") -> int:
    """Create a certificate authority (CA); an existing one is left as it is.

    Parameters
    ----------
    folder
        Folder of the CA. Its ca.key signs certificates: keep the folder off the devices and brokers.
    days
        Days for which the CA is valid.
    name
        Common name of the CA.
    """
    with needing("operator"):
        from fedhlm_fleet.pki import authority
    if not name.strip() or len(name) > 64:
        raise ConfigError("--name", name, "1..64 characters")
    made = authority.create(folder, days=days, name=name, now=_now())
    until = authority.ca_certificate(folder).not_valid_after_utc
    print(f"{'made a CA in' if made else 'nothing changed, there is a CA in'} {folder}, good until {until:%Y-%m-%d}")
    if made:
        print(f"next: fedhlm pki issue broker --role broker --dns HOST --pki {folder}")
    return 0


@app.command
def issue(
    name: str,
    /,
    *,
    role: CertificateRole | None = None,
    cluster: Many = (),
    dns: Many = (),
    days: Days = 365,
    renew: Flag = False,
    if_missing: Flag = False,
    pki: Path = PKI,
) -> int:
    """Issue a private key and a certificate for a party, and print where they are and which configuration keys to set.

    Parameters
    ----------
    name
        Name of the party: agent.id, edge-CLUSTER, cloud, or any name for a broker, client or observer.
    role
        Role of the certificate; an observer reads all topics and writes none.
    cluster
        Cluster of the party; agents and clients may have several, and a client without one reaches all.
    dns
        Host names and addresses by which parties reach this broker.
    days
        Days for which the certificate is valid, but no longer than the CA.
    renew
        Replace the certificate of a name; flags that are not given keep their values. The former certificate stays
        valid until it expires or is revoked.
    if_missing
        Do nothing and succeed if the name has a valid certificate.
    pki
        Folder of the CA.
    """
    with needing("operator"):
        from fedhlm_fleet.pki import authority
        from fedhlm_fleet.pki.registry import Registry
    now = _now()
    if if_missing and not renew:
        entry = Registry.load(pki).entries.get(name)
        if entry is not None and entry.usable(now):
            given = (role or entry.role, cluster or entry.clusters, dns or entry.hosts)
            if given != (entry.role, entry.clusters, entry.hosts):
                was = " ".join((entry.role, *entry.clusters, *entry.hosts))
                raise ConfigError("NAME", name, "a name that is not issued yet, unless with --renew", why=was)
            print(f"nothing changed, {name} is issued until {entry.newest.not_after:%Y-%m-%d}")
            return 0
    made = authority.issue(pki, name, role=role, clusters=cluster, hosts=dns, days=days, renew=renew, now=now)
    print_facts(_told(made))
    return 0


@app.command
def revoke(
    name: str,
    /,
    *keys: Keys,
    superseded: Flag = False,
    broker: str | None = None,
    config: Path | None = None,
    pki: Path = PKI,
) -> int:
    """Revoke all certificates of a name, such as a lost device; brokers reject it once they have the new list.

    With a broker, an agent or edge is also forgotten: all edges and the cloud drop what it has contributed
    (fedhlm federation forget). The other broker keys are flags too: --broker.ca ca.pem.

    Parameters
    ----------
    name
        Name of the party.
    superseded
        Revoke all but the newest certificate, after a renewal.
    broker
        URL of the broker between the edges and the cloud.
    config
        TOML file with the keys of that broker.
    pki
        Folder of the CA.
    """
    with needing("operator"):
        from fedhlm_fleet.pki import authority
        from fedhlm_fleet.pki.registry import Registry
    taken = authority.revoke(pki, name, superseded=superseded, now=_now())
    if not taken:
        print(f"nothing changed, {name} has no {'superseded ' if superseded else ''}certificate left to revoke")
    for certificate in taken:
        print(f"revoked {name}, serial {certificate.serial}, good until {certificate.not_after:%Y-%m-%d}")
    print(f"list: {pki / authority.CRL}; brokers load it after `fedhlm pki mosquitto ...` and SIGHUP")
    party = CERTIFICATES[Registry.load(pki).entries[name].role].party
    if superseded or not (party.drafts or party.relays):
        return 0
    if broker is None and config is None and not keys:
        print(f"next: fedhlm federation forget {name} --broker URL, so that what it contributed goes too")
        return 0
    return federation.have_forgotten(federation.section(keys, broker, config), name, known_only=False)


@app.command(name="list")
def list_(*, pki: Path = PKI, json: Flag = False) -> int:
    """List all certificates with their end dates and states, and the end dates of the CA and its revocation list.

    Parameters
    ----------
    pki
        Folder of the CA.
    json
        Print one JSON array instead of the table.
    """
    with needing("operator"):
        from fedhlm_fleet.pki import authority
        from fedhlm_fleet.pki.registry import Registry
    now = _now()
    until = authority.ca_certificate(pki).not_valid_after_utc
    entries = [entry for _, entry in sorted(Registry.load(pki).entries.items())]
    heads = ("name", "role", "cluster", "serial", "not after", "state")
    rows = [
        (e.name, e.role, ",".join(e.clusters) or "-", c.serial, f"{c.not_after:%Y-%m-%d}", c.state(now))
        for e in entries
        for c in e.certificates
    ]
    if json:
        named = [dict(zip((head.replace(" ", "_") for head in heads), row, strict=True)) for row in rows]
        print(msgspec.json.encode(named).decode())
        return 0
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    for row in (heads, *rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    crl_until = authority.crl_until(pki)
    print(f"\nCA good until {until:%Y-%m-%d}{_hurry(until, now, 'make a new one in another folder')}")
    print(f"revocation list good until {crl_until:%Y-%m-%d}{_hurry(crl_until, now, 'fedhlm pki crl')}")
    return 0


@app.command
def crl(*, pki: Path = PKI) -> int:
    """Renew the revocation list; a broker whose list has expired rejects every connection.

    Parameters
    ----------
    pki
        Folder of the CA.
    """
    with needing("operator"):
        from fedhlm_fleet.pki import authority
    until = authority.renew_crl(pki, now=_now())
    print(f"{pki / authority.CRL} is good until {until:%Y-%m-%d}; copy it to the brokers and send them SIGHUP")
    return 0


@app.command
def mosquitto(
    *,
    out: Path,
    cluster: str | None = None,
    cloud: Flag = False,
    all: Flag = False,  # noqa: A002  the flag's name
    plain: Flag = False,
    broker: str | None = None,
    port: Port = None,
    bind: str = "",
    at: str = "",
    data: str = "/var/lib/mosquitto/",
    root: str | None = None,
    pki: Path = PKI,
) -> int:
    """Write the configuration, ACL, certificates and revocation list of a mosquitto broker to a folder.

    Run it again after every issue and revoke; the broker loads the changes on SIGHUP.

    Parameters
    ----------
    out
        Folder to write.
    cluster
        Configure the broker of this cluster.
    cloud
        Configure the broker between the edges and the cloud.
    all
        Configure one broker for everything.
    plain
        Configure a broker for development: no certificates, no access rules, reachable from this machine only.
    broker
        Name of the broker's certificate, if several were issued.
    port
        Port to listen on; by default 8883, or 1883 with --plain.
    bind
        Address to listen on; by default all addresses, or 127.0.0.1 with --plain.
    at
        Path of the folder as the broker sees it, for a container: /mosquitto/config.
    data
        Folder of the broker's own state.
    root
        First levels of all topics; by default that of broker.root.
    pki
        Folder of the CA.
    """
    with needing("operator"):
        from fedhlm.protocol.topics import DEFAULT_ROOT
        from fedhlm_fleet.pki import mosquitto as make
    if [cluster is not None, cloud, all, plain].count(True) != 1:
        raise ConfigError("--cluster, --cloud, --all, --plain", None, "exactly one of them")
    listener = make.Listener(port or (1883 if plain else 8883), bind, at, data)
    if plain:
        make.configure_plain(out, listener=listener)
        print(f"wrote {out / make.CONFIGURATION}: no TLS, for development")
    else:
        place = _place(cluster, cloud=cloud)
        entry = make.configure(
            pki, out, place=place, listener=listener, broker=broker, root=root or DEFAULT_ROOT, now=_now()
        )
        print_facts(
            {
                "folder": out,
                "broker": f"{entry.name}, reached as {', '.join(entry.hosts)}, port {listener.port}",
                "rights": out / make.ACL,
                "key": f"{out / make.KEY}, which the user that mosquitto runs as must be able to read",
            }
        )
    print(f"next: mosquitto -c {at or out}/{make.CONFIGURATION}, or SIGHUP to a running broker")
    return 0


def _place(cluster: str | None, *, cloud: bool) -> "BrokerPlace":
    from fedhlm_fleet.pki.acl import BrokerPlace

    if cluster is not None:
        return BrokerPlace("cluster", cluster)
    return BrokerPlace("cloud") if cloud else BrokerPlace("shared")


def _told(made: "Made") -> dict[str, object]:
    entry = made.entry
    end = f"{entry.newest.not_after:%Y-%m-%d}"
    facts: dict[str, object] = {
        "issued": f"{entry.name}, {entry.role}{' of ' + ', '.join(entry.clusters) if entry.clusters else ''}",
        "serial": entry.newest.serial,
        "good until": f"{end}, when the CA expires" if made.clipped else end,
    }
    traits = CERTIFICATES[entry.role]
    if traits.listens:
        facts |= {"cert": made.cert, "key": made.key, "hosts": ", ".join(entry.hosts)}
        facts["next"] = "fedhlm pki mosquitto, which copies them"
    else:
        facts |= {"broker.ca": made.ca, "broker.cert": made.cert, "broker.key": made.key}
        if traits.party.relays:
            facts["edge.upstream"] = "the same three as edge.upstream.ca, .cert and .key"
        if traits.party.drafts:
            facts["also"] = f"agent.id {entry.name}, cluster.name {entry.clusters[0]}"
        facts["next"] = "fedhlm pki mosquitto and SIGHUP, so that brokers know the name"
    for former in made.former:
        facts["former"] = f"serial {former.serial} stays good until {former.not_after:%Y-%m-%d}; "
        facts["former"] = f"{facts['former']}fedhlm pki revoke {entry.name} --superseded revokes it"
    return facts


def _hurry(until: datetime, now: datetime, remedy: str) -> str:
    from fedhlm_fleet.pki.registry import EXPIRING

    return f": {remedy}" if now >= until - EXPIRING else ""


def _now() -> datetime:
    return datetime.now(UTC)
