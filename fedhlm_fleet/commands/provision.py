"""`fedhlm provision`: the command line of fedhlm_fleet.flash.provision."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from fedhlm_fleet.commands.common import print_facts
from fedhlm_fleet.commands.flash import NO_IDENTITY, SHIPPED, ContentFlags, Flag, IdentityFlags, Python, given, tls_of
from fedhlm_fleet.commands.mistakes import Between

Port = Annotated[int | None, Parameter(validator=Between(gte=1, lte=65_535))]

app = App(name="provision", help="Set up an agent on a machine that is already running.")


@app.command
def ssh(
    host: str,
    /,
    *,
    agent: str,
    cluster: str,
    broker: str,
    certificate: IdentityFlags = NO_IDENTITY,
    bundle: Path | None = None,
    contents: ContentFlags = SHIPPED,
    python: Python | None = None,
    interpreter: Path | None = None,
    port: Port = None,
    identity: Path | None = None,
    dry_run: Flag = False,
) -> int:
    """Install an agent as a service on a machine over ssh (Jetson, Ubuntu, Debian).

    If the machine already has this very installation, nothing is changed.

    Parameters
    ----------
    host
        [USER@]HOST, or a name from ~/.ssh/config. The user must be root, or be allowed sudo without a password.
    agent
        Name of the device, agent.id.
    cluster
        Name of its cluster, cluster.name.
    broker
        URL of its broker, mqtts://HOST[:PORT].
    bundle
        Folder that keeps the wheels for this kind of machine; pip fills it when it is empty. By default
        bundle-MACHINE-PYTHON.
    python
        Python version of --interpreter; by default the machine's own.
    interpreter
        Python to install with the agent, for a machine whose own is older than 3.11 (Ubuntu 22.04): a .tar.gz with
        python/bin/python3.
    port
        Port of the ssh server.
    identity
        Private key file for ssh.
    dry_run
        Query the machine and print what would be done; change nothing.
    """
    from fedhlm_fleet.flash import batch, provision
    from fedhlm_fleet.flash import bundle as bundles
    from fedhlm_fleet.flash.plan import payload

    now = datetime.now(UTC)
    party = batch.party_of(given(agent=agent, cluster=cluster, broker=broker, **certificate.files()))
    run = provision.over_ssh(host, port=port, identity=str(identity or ""))
    found = provision.probe(run)
    version = provision.python_for(found, wanted=python, interpreter=interpreter is not None)
    folder = bundle or Path(f"bundle-{found.machine}-{version}")
    kind = {"python": version, "machine": found.machine}
    listed = bundles.wheels(contents.wheels, **kind) if contents.wheels else bundles.fill(folder, **kind)
    parts = bundles.parts(listed, model=contents.model, interpreter=interpreter)
    tls = tls_of(party, certificate.pki, now, issue=not dry_run)
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
