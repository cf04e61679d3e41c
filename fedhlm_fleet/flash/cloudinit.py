"""First-boot files of cloud-init (NoCloud) on a card's boot partition: user-data, network-config and meta-data.

Raspberry Pi OS (Trixie) reads them from /boot/firmware. A systemd service installs the payload from a folder beside
them, and tries again at the next boot if the power fails. `check` validates the structure of the files without
`cloud-init schema`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fedhlm_fleet.flash.plan import FOLDER, INSTALLER, Device, FlashError, Payload, PlannedFile

BOOT: Final = "/boot/firmware"
USER_DATA: Final = "user-data"
NETWORK: Final = "network-config"
META_DATA: Final = "meta-data"
HEADER: Final = "#cloud-config\n"
SERVICE: Final = "fedhlm-install.service"

# The service runs at every boot while the folder exists. install.sh removes the folder at the end.
_SERVICE: Final = f"""[Unit]
Description=Install FedHLM from the boot partition
ConditionPathExists={BOOT}/{FOLDER}/{INSTALLER}
RequiresMountsFor={BOOT}

[Service]
Type=oneshot
ExecStart=/bin/sh {BOOT}/{FOLDER}/{INSTALLER} --consume
TimeoutStartSec=30min

[Install]
WantedBy=multi-user.target
"""
_GROUPS: Final = "adm,dialout,sudo,video,plugdev,input,gpio,spi,i2c,netdev,render"
_KEYS: Final = {"hostname", "manage_etc_hosts", "preserve_hostname", "ssh_pwauth", "users", "write_files", "runcmd"}
# A network may be called "no", which YAML 1.1 would read as a boolean.
_PLAIN: Final = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)\Z)[a-z_][a-z0-9_-]*", re.ASCII)


def user_data(device: Device) -> dict[str, Any]:
    """Return the user-data of a device: its host name, who may log in, and the service that installs the payload."""
    document: dict[str, Any] = {
        "hostname": device.hostname,
        "preserve_hostname": False,
        "manage_etc_hosts": True,
        "ssh_pwauth": False,
        "write_files": [
            {
                "path": f"/etc/systemd/system/{SERVICE}",
                "owner": "root:root",
                "permissions": "0644",
                "content": _SERVICE,
            }
        ],
        "runcmd": [["systemctl", "daemon-reload"], ["systemctl", "enable", "--now", "--no-block", SERVICE]],
    }
    # Without a key the user of the image stays as it is, which normally means locked.
    if device.ssh_key:
        document["users"] = [
            {
                "name": device.user,
                "groups": _GROUPS,
                "shell": "/bin/bash",
                # The user has no password, so sudo cannot ask for one.
                "lock_passwd": True,
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": [device.ssh_key],
            }
        ]
        document["runcmd"].append(["systemctl", "enable", "--now", "--no-block", "ssh.service"])
    if device.wifi is not None:
        # Raspberry Pi OS keeps the radio off until the country is set.
        document["runcmd"].insert(0, "rfkill unblock wifi || true")
    return document


def network_config(device: Device) -> dict[str, Any]:
    """Return the network-config (Netplan, version 2): Ethernet with DHCP, and Wi-Fi. Neither delays the boot."""
    network: dict[str, Any] = {
        "version": 2,
        "ethernets": {"eth0": {"dhcp4": True, "dhcp6": True, "optional": True}},
    }
    if (wifi := device.wifi) is not None:
        point: dict[str, Any] = {"password": wifi.password} if wifi.password else {}
        point |= {"hidden": True} if wifi.hidden else {}
        network["wifis"] = {
            "wlan0": {
                "dhcp4": True,
                "dhcp6": True,
                "optional": True,
                "regulatory-domain": wifi.country,
                "access-points": {wifi.ssid: point},
            }
        }
    return {"network": network}


def meta_data(device: Device, digest: str) -> dict[str, Any]:
    """Return the meta-data, which names the instance: cloud-init runs first boot again only for a new `digest`."""
    return {
        "dsmode": "local",
        "instance-id": f"fedhlm-{device.hostname}-{digest}",
        "local-hostname": device.hostname,
    }


def card(device: Device, payload: Payload) -> tuple[PlannedFile, ...]:
    """Return all files for the boot partition.

    Raises:
        FlashError: the structure of user-data is not valid.
    """
    user = user_data(device)
    check(user)
    # The instance id covers everything that first boot applies, so that even a new Wi-Fi password alone takes effect.
    seeds = (
        PlannedFile(USER_DATA, (HEADER + to_yaml(user)).encode()),
        PlannedFile(NETWORK, to_yaml(network_config(device)).encode(), secret=True),
    )
    named = PlannedFile("", "".join([payload.digest, *(seed.sha256 for seed in seeds)]).encode()).sha256[:16]
    meta = PlannedFile(META_DATA, to_yaml(meta_data(device, named)).encode())
    return (*(part._replace(path=f"{FOLDER}/{part.path}") for part in payload.parts), *seeds, meta)


def masked(device: Device) -> str:
    """Return the first-boot files as text, without the Wi-Fi password."""
    network = network_config(device)
    if device.wifi is not None and device.wifi.password:
        network["network"]["wifis"]["wlan0"]["access-points"][device.wifi.ssid]["password"] = "***"  # noqa: S105  the mask
    return f"{HEADER}{to_yaml(user_data(device))}\n# {NETWORK}\n{to_yaml(network)}"


def check(document: Mapping[str, Any]) -> None:
    """Check the structure of user-data, without cloud-init.

    Raises:
        FlashError: the message names the key and what cloud-init expects there.
    """
    if unknown := sorted(document.keys() - _KEYS):
        raise FlashError(f"keys of user-data must be among {sorted(_KEYS)} (got {unknown[0]!r})")
    if not isinstance(document.get("hostname"), str):
        raise FlashError(f"user-data.hostname must be text (got {document.get('hostname')!r})")
    for index, command in enumerate(document.get("runcmd", ())):
        if not (isinstance(command, str) or (command and all(isinstance(word, str) for word in command))):
            raise FlashError(f"user-data.runcmd[{index}] must be text or a list of words (got {command!r})")
    for index, file in enumerate(document.get("write_files", ())):
        if not str(file.get("path", "")).startswith("/"):
            raise FlashError(f"user-data.write_files[{index}].path must be an absolute path (got {file.get('path')!r})")
        # YAML would read an unquoted value as a number.
        if not re.fullmatch(r"0[0-7]{3}", str(file.get("permissions", ""))):
            raise FlashError(
                f"user-data.write_files[{index}].permissions must be text of four octal digits (got {file.get('permissions')!r})"
            )
    for index, user in enumerate(document.get("users", ())):
        if not user.get("ssh_authorized_keys") or not user.get("lock_passwd"):
            raise FlashError(f"user-data.users[{index}] must be given an ssh key and a locked password")


def to_yaml(document: Mapping[str, Any]) -> str:
    """Write block YAML with every text in JSON's double quotes, so that none is read as a number or a date."""
    return "\n".join(_mapping(document, 0)) + "\n"


def _mapping(value: Mapping[str, Any], depth: int) -> list[str]:
    lines: list[str] = []
    for key, inner in value.items():
        lines += _entry(f"{'  ' * depth}{key if _PLAIN.fullmatch(key) else _text(key)}:", inner, depth)
    return lines


def _sequence(value: Sequence[Any], depth: int) -> list[str]:
    lines: list[str] = []
    for inner in value:
        lines += _entry(f"{'  ' * depth}-", inner, depth)
    return lines


def _entry(head: str, value: Any, depth: int) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [head, *_mapping(value, depth + 1)]
    if isinstance(value, list) and value:
        return [head, *_sequence(value, depth + 1)]
    return [f"{head} {_text(value) if isinstance(value, str) else json.dumps(value)}"]


def _text(text: str) -> str:
    # Characters that YAML 1.1 does not count as printable are escaped.
    return "".join(c if c.isprintable() and c < "\ud800" else _escaped(c) for c in json.dumps(text, ensure_ascii=False))


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
