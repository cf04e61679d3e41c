"""`fedhlm provision`: flags and words around fedhlm_fleet.flash.provision."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from fedhlm_fleet.commands.common import print_facts
from fedhlm_fleet.commands.flash import Flag, Python, given, tls_of

Port = Annotated[int | None, Parameter(validator=Number(gte=1, lte=65_535))]

app = App(name="provision", help="Make machines ready that already run.")


@app.command
def ssh(
    host: str,
    /,
    *,
    agent: str,
    cluster: str,
    broker: str,
    pki: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    ca: Path | None = None,
    config: Path | None = None,
    bundle: Path | None = None,
    wheels: Path | None = None,
    model: Path | None = None,
    python: Python | None = None,
    interpreter: Path | None = None,
    port: Port = None,
    identity: Path | None = None,
    dry_run: Flag = False,
) -> int:
    """Install an agent as a service on a machine over ssh (Jetson, Ubuntu, Debian); again, it changes only what differs.

    Parameters
    ----------
    host
        [USER@]HOST as ssh knows it, or a name of ~/.ssh/config. The user is root or may use sudo without a password.
    agent
        The device's name, agent.id.
    cluster
        Its cluster, cluster.name.
    broker
        Its broker, mqtts://HOST[:PORT].
    pki
        Folder of `fedhlm pki`: the agent's certificate is taken from it, or made where it has none.
    cert
        Certificate in PEM, instead of --pki.
    key
        Its key.
    ca
        Who signed the broker's and this certificate.
    config
        TOML file with further keys of the agent, such as agent.providers.
    bundle
        Folder in which wheels are kept for this kind of machine; filled by pip when it is empty. By default
        bundle-MACHINE-PYTHON.
    wheels
        Folder of wheels that is taken as it is, without any network.
    model
        Model folder to use instead of the shipped one.
    python
        Version of --interpreter; the machine's own otherwise.
    interpreter
        A Python to send along, where the machine's is older than 3.11 (Ubuntu 22.04): .tar.gz with python/bin/python3.
    port
        Port of the ssh server.
    identity
        Key file for ssh.
    dry_run
        Ask the machine what it is and say what would be done.
    """
    from fedhlm_fleet.flash import batch, provision
    from fedhlm_fleet.flash import bundle as bundles
    from fedhlm_fleet.flash.plan import payload

    now = datetime.now(UTC)
    party = batch.party_of(given(agent=agent, cluster=cluster, broker=broker, config=config, cert=cert, key=key, ca=ca))
    run = provision.over_ssh(host, port=port, identity=str(identity or ""))
    found = provision.probe(run)
    version = provision.python_for(found, wanted=python, interpreter=interpreter is not None)
    folder = bundle or Path(f"bundle-{found.machine}-{version}")
    kind = {"python": version, "machine": found.machine}
    listed = bundles.wheels(wheels, **kind) if wheels else bundles.fill(folder, **kind)
    parts = bundles.parts(listed, model=model, interpreter=interpreter)
    tls = tls_of(party, pki, now, issue=not dry_run)
    made = payload(
        party.device,
        tls=tls,
        settings=party.settings,
        bundle=parts,
        units=bundles.shipped_units(),
        made_s=int(now.timestamp()),
    )
    size = sum(part.size for part in made.parts)
    print_facts(
        {
            "machine": f"{host}, {found.system}, {found.machine}",
            "python": f"{version}{', sent along' if interpreter else ', its own'}",
            "installed": found.installed or "nothing",
            "payload": f"{made.digest}, {len(made.parts)} files, {size / 1e6:.1f} MB",
        }
    )
    if dry_run:
        for part in made.parts:
            print(f"  {part.size:>10}  {part.path}{'  (secret)' if part.secret else ''}")
        print("nothing was sent" if found.installed != made.digest else "nothing would change")
        return 0
    changed = provision.install(run, found, made)
    print("installed into /opt/fedhlm, fedhlm-agent is started" if changed else "nothing changed")
    return 0
