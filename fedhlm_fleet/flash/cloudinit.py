"""First-boot files of cloud-init (NoCloud): user-data, network-config and meta-data, which lie on a card's boot partition.

Raspberry Pi OS (Trixie) reads them from /boot/firmware. What is to be installed lies in a folder beside them; a service of its own
installs it, again at the next boot where power failed in between. `check` is our own look at their structure; cloud-init's own is
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

# Runs at every boot where the folder is there. install.sh removes the folder when all is installed.
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
# A network may be called "no": YAML 1.1 would make a truth value of it.
_PLAIN: Final = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)\Z)[a-z_][a-z0-9_-]*", re.ASCII)


def user_data(device: Device) -> dict[str, Any]:
    """cloud-init's configuration of a device: host name, who may log in, and the service that installs the rest."""
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
    # Without a key the image's own user stays as it is: locked, unless the image has another idea.
    if device.ssh_key:
        document["users"] = [
            {
                "name": device.user,
                "groups": _GROUPS,
                "shell": "/bin/bash",
                # There is no password: sudo could not ask for one.
                "lock_passwd": True,
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": [device.ssh_key],
            }
        ]
        document["runcmd"].append(["systemctl", "enable", "--now", "--no-block", "ssh.service"])
    if device.wifi is not None:
        # Raspberry Pi OS keeps the radio off until a country is known.
        document["runcmd"].insert(0, "rfkill unblock wifi || true")
    return document


def network_config(device: Device) -> dict[str, Any]:
    """Netplan, version 2: the cable by DHCP, and the device's Wi-Fi. Neither delays booting when it is absent."""
    network: dict[str, Any] = {
        "version": 2,
        "ethernets": {"eth0": {"dhcp4": True, "dhcp6": True, "optional": True}},
    }
    if (wifi := device.wifi) is not None:
        network["wifis"] = {
            "wlan0": {
                "dhcp4": True,
                "dhcp6": True,
                "optional": True,
                "regulatory-domain": wifi.country,
                "access-points": {wifi.ssid: {"password": wifi.psk} if wifi.psk else {}},
            }
        }
    return {"network": network}


def meta_data(device: Device, digest: str) -> dict[str, Any]:
    """The instance: a new `digest` makes cloud-init go through first boot again, an equal one leaves the device alone."""
    return {
        "dsmode": "local",
        "instance-id": f"fedhlm-{device.hostname}-{digest}",
        "local-hostname": device.hostname,
    }


def card(device: Device, payload: Payload) -> tuple[PlannedFile, ...]:
    """Everything that goes onto a boot partition.

    Raises:
        FlashError: our own structural check fails.
    """
    user = user_data(device)
    check(user)
    # The instance is named by all that first boot applies, so that a new Wi-Fi key alone is applied as well.
    seeds = (
        PlannedFile(USER_DATA, (HEADER + to_yaml(user)).encode()),
        PlannedFile(NETWORK, to_yaml(network_config(device)).encode(), secret=True),
    )
    named = PlannedFile("", "".join([payload.digest, *(seed.sha256 for seed in seeds)]).encode()).sha256[:16]
    meta = PlannedFile(META_DATA, to_yaml(meta_data(device, named)).encode())
    return (*(part._replace(path=f"{FOLDER}/{part.path}") for part in payload.parts), *seeds, meta)


def masked(device: Device) -> str:
    """The first-boot files for human eyes: no Wi-Fi key."""
    network = network_config(device)
    if device.wifi is not None and device.wifi.psk:
        network["network"]["wifis"]["wlan0"]["access-points"][device.wifi.ssid]["password"] = "***"  # noqa: S105  the mask
    return f"{HEADER}{to_yaml(user_data(device))}\n# {NETWORK}\n{to_yaml(network)}"


def check(document: Mapping[str, Any]) -> None:
    """Our own check of user-data's structure; it needs no cloud-init.

    Raises:
        FlashError: names the key and what cloud-init expects there.
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
        # Unquoted, YAML would read a number with another base.
        if not re.fullmatch(r"0[0-7]{3}", str(file.get("permissions", ""))):
            raise FlashError(
                f"user-data.write_files[{index}].permissions must be text of four octal digits (got {file.get('permissions')!r})"
            )
    for index, user in enumerate(document.get("users", ())):
        if not user.get("ssh_authorized_keys") or not user.get("lock_passwd"):
            raise FlashError(f"user-data.users[{index}] must be given an ssh key and a locked password")


def to_yaml(document: Mapping[str, Any]) -> str:
    """Block YAML with every text in double quotes (JSON's, which are YAML's): no value is taken for a number or a date."""
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
    # What YAML 1.1 does not take as printable is escaped.
    return "".join(c if c.isprintable() and c < "\ud800" else _escaped(c) for c in json.dumps(text, ensure_ascii=False))


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
