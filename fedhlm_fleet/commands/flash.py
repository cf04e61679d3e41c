"""`fedhlm flash`: the command line of fedhlm_fleet.flash."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from fedhlm.errors import ConfigError
from fedhlm_fleet.commands.common import needing

if TYPE_CHECKING:
    from fedhlm_fleet.flash.batch import BatchDevice, Order, WrittenCard
    from fedhlm_fleet.flash.plan import Payload, Tls

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Python = Literal["3.11", "3.12", "3.13"]
BUNDLE: Final = Path("bundle")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class IdentityFlags:
    """The flags that give an agent its certificate, and further keys."""

    pki: Path | None = None
    """Folder of `fedhlm pki`: the agent's certificate is taken from there, and issued if there is none."""

    cert: Path | None = None
    """Certificate of the agent in PEM, instead of --pki."""

    key: Path | None = None
    """Private key of --cert."""

    ca: Path | None = None
    """Certificate of the authority that signed the broker's certificate and --cert."""

    config: Path | None = None
    """TOML file with further keys of the agent, such as agent.providers."""

    def files(self) -> dict[str, Path | None]:
        """Return the files by the names that a device has for them."""
        return {"config": self.config, "cert": self.cert, "key": self.key, "ca": self.ca}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ContentFlags:
    """The flags that say what is installed."""

    wheels: Path | None = None
    """Folder of wheels to use as it is, without network access."""

    model: Path | None = None
    """Model folder to use instead of the shipped one."""


NO_IDENTITY: Final = IdentityFlags()
SHIPPED: Final = ContentFlags()


def flash(
    *,
    image: Path | None = None,
    boot: Path | None = None,
    device: Path | None = None,
    out: Path | None = None,
    csv: Path | None = None,
    agent: str = "",
    cluster: str = "",
    broker: str = "",
    hostname: str = "",
    user: str = "pi",
    ssh_key: Path | None = None,
    wifi_ssid: str = "",
    wifi_password_file: Path | None = None,
    wifi_country: str = "",
    wifi_hidden: Flag = False,
    identity: IdentityFlags = NO_IDENTITY,
    bundle: Path = BUNDLE,
    contents: ContentFlags = SHIPPED,
    python: Python = "3.13",
    manifest: Path | None = None,
    dry_run: Flag = False,
    yes: Flag = False,
) -> int:
    """Prepare SD cards or images of Raspberry Pi OS that boot into a running agent, without internet.

    Parameters
    ----------
    image
        Image of Raspberry Pi OS (64 bit, Trixie), .img or .img.xz. It is changed in place, or with --out or
        --device copied there first.
    boot
        Folder where the boot partition of a card is mounted.
    device
        Card with Raspberry Pi OS, such as /dev/sdX. A disk that is mounted, in use or not removable is rejected.
    out
        File for the changed copy of --image, or a folder for AGENT.img.
    csv
        CSV file for many cards: a line of column names (agent, and any of these flags with _ for -), then one line per
        card. An empty cell takes the value of the flag.
    agent
        Name of the device, agent.id.
    cluster
        Name of its cluster, cluster.name.
    broker
        URL of its broker, mqtts://HOST[:PORT].
    hostname
        Host name; by default the agent's name.
    user
        User who may log in with --ssh-key.
    ssh_key
        File with a public key; without one nobody can log in.
    wifi_ssid
        Name of the Wi-Fi network.
    wifi_password_file
        File with the Wi-Fi password; without one the network is open. It is written to the card as it is, because
        WPA3 needs it. For WPA2 it may be the key of 64 hex digits that `wpa_passphrase` derives from it.
    wifi_country
        Country code, such as DE.
    wifi_hidden
        The network does not announce its name.
    bundle
        Folder that keeps the wheels for the device; pip fills it when it is empty.
    python
        Python version of the image: 3.13 for Trixie, 3.11 for Bookworm.
    manifest
        File for a list of the images that Raspberry Pi Imager reads (.rpi-imager-manifest).
    dry_run
        Print what would be written; write nothing, and issue no certificate.
    yes
        Write to --device without asking.
    """
    from fedhlm.decoding.decoder import load_info
    from fedhlm_fleet.flash import batch
    from fedhlm_fleet.flash import bundle as bundles
    from fedhlm_fleet.flash.plan import payload

    now = datetime.now(UTC)
    values = given(
        agent=agent, cluster=cluster, broker=broker, hostname=hostname, user=user, ssh_key=ssh_key, wifi_ssid=wifi_ssid,
        wifi_password_file=wifi_password_file, wifi_country=wifi_country,
        wifi_hidden="yes" if wifi_hidden else "", **identity.files(),
        boot=boot, image=image, device=device, out=out,
    )  # fmt: skip
    orders = batch.read(csv, values) if csv is not None else [batch.order_of(values)]
    if manifest is not None and any(order.place != (order.out or order.image) for order in orders):
        raise ConfigError(
            "--manifest", str(manifest), "left out unless images are written (--image, and --out for several)"
        )
    if len(orders) == 1:  # of several, one that fails does not stop the others
        batch.require_place(orders[0])
        tls_of(orders[0].party, identity.pki, now, issue=False)
    if contents.model is not None:
        load_info(contents.model)
    found = bundles.wheels(contents.wheels, python=python) if contents.wheels else bundles.fill(bundle, python=python)
    parts = bundles.parts(found, model=contents.model)
    units = bundles.shipped_units()

    def payload_of(order: "Order") -> "Payload":
        tls = tls_of(order.party, identity.pki, now, issue=not dry_run)
        made_s = int(now.timestamp())
        return payload(order.device, tls=tls, settings=order.party.settings, bundle=parts, units=units, made_s=made_s)

    if dry_run:
        for order in orders:
            print("\n".join(batch.described(order, payload_of(order))))
        return 0
    _confirm(orders, yes=yes)
    done, failed = batch.make_all(orders, payload_of, print)
    if manifest is not None:
        _manifest(manifest, done, now)
    if done:
        print("next: put the card into the device; first boot installs the agent in a few minutes, which then serves")
    return 1 if failed else 0


def given(**values: str | Path | None) -> dict[str, str]:
    """Return the values that were given on the command line, as text by name."""
    return {name: str(value) for name, value in values.items() if value}


def tls_of(party: "BatchDevice", pki: Path | None, now: datetime, *, issue: bool) -> "Tls | None":
    """Return the certificate of a device, from its files or the PKI.

    None: its broker does not use TLS, or neither files nor a PKI were given.

    Raises:
        FedhlmError: no certificate can be used.
    """
    from fedhlm_fleet.flash.plan import Tls

    if not party.device.uses_tls or (party.certificate is None and pki is None):
        return None
    with needing("operator"):
        from fedhlm_fleet.flash import credentials
    agent = party.device.agent
    if party.certificate is not None:
        cert, key, ca = party.certificate
        return credentials.from_files(cert, key, ca, agent=agent, now=now)
    assert pki is not None  # noqa: S101  one of the two is given, as checked above
    found = credentials.from_pki(pki, agent, party.device.cluster, now=now, issue=issue)
    # A dry run issues nothing: these texts are about as long as a certificate will be.
    return found or Tls(b"*" * 650, b"*" * 750, b"*" * 241)


def _confirm(orders: "Sequence[Order]", *, yes: bool, ask: Callable[[str], str] = input) -> None:
    from fedhlm_fleet.flash import disks

    targets = [disks.require_card(order.disk) for order in orders if order.disk is not None]
    if not targets or yes:
        return
    named = ", ".join(f"{disk.path} ({disk.model or 'unnamed'}, {disk.size / 1e9:.1f} GB)" for disk in targets)
    if not sys.stdin.isatty():
        raise ConfigError("--yes", None, f"given without a terminal, to confirm {named}")
    if ask(f"write to {named}? [y/N] ").strip().lower() not in {"y", "yes"}:
        raise ConfigError("--device", named, "confirmed (nothing was written)")


def _manifest(path: Path, done: "Sequence[WrittenCard]", now: datetime) -> None:
    from fedhlm_fleet.flash import manifest

    entries = [
        manifest.entry(made.order.place, agent=made.order.device.agent, cluster=made.order.device.cluster, made=now)
        for made in done
    ]
    manifest.write(path, entries)
    print(f"{path}: {len(entries)} images, for `rpi-imager --repo {path}`")
