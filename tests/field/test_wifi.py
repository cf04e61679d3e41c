"""The network of a card as netplan turns it into files, and as NetworkManager and wpa_supplicant read these files."""

import importlib
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhlm.errors import ConfigError
from fedhlm_fleet.flash import cloudinit
from fedhlm_fleet.flash.plan import Device, Wifi

yaml = importlib.import_module("yaml")
GENERATE = shutil.which("generate", path="/usr/libexec/netplan:/usr/lib/netplan")
NMCLI = shutil.which("nmcli")
KEY = "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
WIFIS = {
    "passphrase": Wifi.of("net", "correct horse", "DE"),
    "key": Wifi.of("net", KEY, "DE"),
    "hidden": Wifi.of("net", "correct horse", "GB", hidden=True),
    "open": Wifi.of("open", None, "US"),
    "signs in the passphrase": Wifi.of("net", r" \a\"b' #;:{[%$=x\ ", "DE"),
    "signs in the name": Wifi.of('the "net": #1; a=b', "correct horse", "DE"),
    "letters": Wifi.of("Zuhause ☕", "correct horse", "DE"),
    "digits": Wifi.of("1234", "12345678", "DE"),
    "a name in quotes": Wifi.of('"net"', "correct horse", "DE"),
    "a backslash in the name": Wifi.of("a\\b\\", "correct horse", "DE"),
    "spaces around the name": Wifi.of(" net ", "correct horse", "DE", hidden=True),
    "32 bytes": Wifi.of(10 * "☕" + "ab", "correct horse", "DE", hidden=True),
    "an apostrophe": Wifi.of("Joe's & Ann's", "correct horse", "DE"),
    "a comment": Wifi.of("#net", "#" * 63, "DE"),
    "semicolons": Wifi.of("a;b;", "correct horse", "DE"),
    "one digit short of a key": Wifi.of("net", KEY[:63], "DE"),
    "a key in capitals": Wifi.of("net", KEY.upper(), "DE"),
    "a name that yaml would read": Wifi.of("no", "correct horse", "NO"),
}
each_wifi = pytest.mark.parametrize("wifi", WIFIS.values(), ids=WIFIS.keys())
netplan = pytest.mark.skipif(GENERATE is None, reason="netplan is not installed")

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8).filter(lambda s: s.isprintable())
passphrases = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=8, max_size=63)


@pytest.mark.parametrize(
    ("ssid", "password", "country", "flag"),
    [
        ("", "correct horse", "DE", "--wifi-ssid"),
        ("☕" * 11, "correct horse", "DE", "--wifi-ssid"),
        ("net\nwork", "correct horse", "DE", "--wifi-ssid"),
        ("49;50;", "correct horse", "DE", "--wifi-ssid"),
        ("net", "2short!", "DE", "--wifi-password-file"),
        ("net", "x" * 64, "DE", "--wifi-password-file"),
        ("net", "schöner Tag", "DE", "--wifi-password-file"),
        ("net", "correct horse", "UK", "--wifi-country .* DE or GB"),
        ("net", "correct horse", "de", "--wifi-country"),
    ],
)
def test_what_no_card_could_use_is_refused(ssid: str, password: str, country: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag) as caught:
        Wifi.of(ssid, password, country)
    assert password not in str(caught.value)


def network_of(wifi: Wifi) -> str:
    device = Device.of(agent="porch", cluster="home", broker="mqtts://edge", hostname="porch", wifi=wifi)
    return cloudinit.to_yaml(cloudinit.network_config(device))


@settings(max_examples=200)
@given(names, passphrases, st.booleans())
def test_every_name_and_passphrase_reads_back(ssid: str, password: str, hidden: bool) -> None:
    read = yaml.safe_load(network_of(Wifi.of(ssid, password, "DE", hidden=hidden)))["network"]["wifis"]["wlan0"]
    (point,) = read["access-points"].items()
    assert point == (ssid, {"password": password} | ({"hidden": True} if hidden else {}))
    assert read["regulatory-domain"] == "DE"


def generated(wifi: Wifi, folder: Path, renderer: Literal["NetworkManager", "networkd"]) -> dict[str, str]:
    """What netplan makes of the file, by path."""
    assert GENERATE is not None
    file = folder / "etc" / "netplan" / "50-cloud-init.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(network_of(wifi).replace("  version: 2\n", f"  version: 2\n  renderer: {renderer}\n"), "utf-8")
    file.chmod(0o600)
    done = subprocess.run([GENERATE, "--root-dir", str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return {str(p.relative_to(folder)): p.read_text("utf-8") for p in folder.rglob("run/**/*") if p.is_file()}


@netplan
@each_wifi
def test_netplan_sets_the_country(wifi: Wifi, tmp_path: Path) -> None:
    files = generated(wifi, tmp_path, "NetworkManager")
    assert f"iw reg set {wifi.country}\n" in files["run/systemd/system/netplan-regdom.service"]


@netplan
@pytest.mark.skipif(NMCLI is None, reason="nmcli is not installed")
@each_wifi
def test_network_manager_reads_what_was_meant(wifi: Wifi, tmp_path: Path) -> None:
    assert NMCLI is not None
    files = generated(wifi, tmp_path, "NetworkManager")
    (keyfile,) = (text for path, text in files.items() if "system-connections/netplan-wlan0" in path)
    # nmcli reads the file as the daemon does. `show` is not there without a daemon; a change of the name is.
    read = subprocess.run(
        [NMCLI, "--offline", "connection", "modify", "connection.id", "read"],
        input=keyfile, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = sections(read)
    assert ssid_of(found["wifi"]["ssid"]) == wifi.ssid
    assert found["wifi"].get("hidden", "false") == ("true" if wifi.hidden else "false")
    if not wifi.password:
        assert "wifi-security" not in found
        return
    # WPA2 and, where the access point has it, WPA3 of the same passphrase.
    assert found["wifi-security"]["key-mgmt"] == "wpa-psk"
    assert unescaped(found["wifi-security"]["psk"]) == wifi.password


def sections(keyfile: str) -> dict[str, dict[str, str]]:
    """The values of a keyfile by section, spaces at their ends included."""
    found: dict[str, dict[str, str]] = {}
    for line in keyfile.splitlines():
        if line.startswith("["):
            found[line[1:-1]] = values = {}
        elif "=" in line:
            key, _, value = line.partition("=")
            values[key] = value
    return found


def ssid_of(value: str) -> str:
    """A name in a keyfile: text, or its bytes as numbers."""
    if value.endswith(";") and all(part.isdigit() for part in value[:-1].split(";")):
        return bytes(int(part) for part in value[:-1].split(";")).decode()
    return unescaped(value).replace(r"\;", ";")


def unescaped(value: str) -> str:
    """A text in a keyfile (GKeyFile): a leading space is \\s, and a backslash is doubled."""
    out, at = "", 0
    while at < len(value):
        if value[at] == "\\":
            out += {"s": " ", "t": "\t", "n": "\n", "r": "\r", "\\": "\\"}.get(value[at + 1], value[at : at + 2])
            at += 2
        else:
            out += value[at]
            at += 1
    return out


@netplan
@each_wifi
def test_wpa_supplicant_is_told_what_was_meant(wifi: Wifi, tmp_path: Path) -> None:
    text = generated(wifi, tmp_path, "networkd")["run/netplan/wpa-wlan0.conf"]
    lines = [line.strip() for line in text.splitlines()]
    assert f"country={wifi.country}" in lines
    assert f'ssid="{wifi.ssid}"' in lines
    assert ("scan_ssid=1" in lines) == wifi.hidden
    if wifi.password == KEY:
        assert f"psk={KEY}" in lines
    elif wifi.password:
        assert f'psk="{wifi.password}"' in text
    else:
        assert "key_mgmt=NONE" in lines
