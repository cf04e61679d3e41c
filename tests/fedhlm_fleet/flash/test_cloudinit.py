"""First-boot files: YAML that reads back, cloud-init's own schema, our own check, and an instance that changes with content."""

import importlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_fleet.flash import cloudinit
from fedhlm_fleet.flash.plan import FlashError, Wifi
from tests.fedhlm_fleet.flash.test_plan import device, payload

# tokenizers brings it along; it has no types here.
yaml = importlib.import_module("yaml")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHh me@desk"
# What YAML can hold at all: no surrogates, and no C1 or control characters unescaped.
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
LEAVES = st.one_of(st.booleans(), st.integers(), TEXT)
DOCUMENTS = st.dictionaries(
    TEXT, st.recursive(LEAVES, lambda i: st.lists(i, max_size=3) | st.dictionaries(TEXT, i, max_size=3), max_leaves=8)
)
DEVICES = [
    device(),
    device(ssh_key=KEY),
    device(ssh_key=KEY, wifi=Wifi.of('the "net": #1', "correct horse", "DE"), hostname="porch-1"),
    device(broker="mqtt://edge", wifi=Wifi.of("open", None, "GB")),
]


@given(DOCUMENTS)
def test_yaml_reads_back_equal(document: dict[str, Any]) -> None:
    assert (yaml.safe_load(cloudinit.to_yaml(document)) or {}) == document


@pytest.mark.parametrize("one", DEVICES)
def test_user_data_passes_cloud_init_s_schema(one: Any, tmp_path: Path) -> None:
    program = shutil.which("cloud-init")
    if program is None:
        pytest.skip("cloud-init is not installed")
    file = tmp_path / "user-data"
    file.write_text(cloudinit.HEADER + cloudinit.to_yaml(cloudinit.user_data(one)))
    done = subprocess.run([program, "schema", "-c", file], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "Valid" in done.stdout
    # The oracle does refuse: the same document with a key that cloud-init does not know.
    file.write_text(cloudinit.HEADER + cloudinit.to_yaml({**cloudinit.user_data(one), "runcmd": {"a": 1}}))
    assert subprocess.run([program, "schema", "-c", file], capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("runcmds", []),
        ("hostname", 7),
        ("runcmd", [[]]),
        ("runcmd", [["a", 1]]),
        ("write_files", [{"path": "etc/x", "permissions": "0644"}]),
        ("write_files", [{"path": "/etc/x", "permissions": 420}]),
        ("users", [{"name": "pi", "lock_passwd": False, "ssh_authorized_keys": [KEY]}]),
        ("users", [{"name": "pi", "lock_passwd": True}]),
    ],
)
def test_our_own_check_refuses(key: str, value: object) -> None:
    good = cloudinit.user_data(DEVICES[2])
    cloudinit.check(good)
    with pytest.raises(FlashError, match=rf"user-data.*{key}"):
        cloudinit.check({**good, key: value})


def test_nobody_can_log_in_without_a_key() -> None:
    assert "users" not in cloudinit.user_data(device())
    assert not any("ssh.service" in command for command in cloudinit.user_data(device())["runcmd"])
    (user,) = cloudinit.user_data(device(ssh_key=KEY))["users"]
    assert user["ssh_authorized_keys"] == [KEY]
    assert user["lock_passwd"]


def test_no_network_is_waited_for() -> None:
    network = cloudinit.network_config(DEVICES[2])["network"]
    assert network["ethernets"]["eth0"]["optional"]
    (name, point), *_ = network["wifis"]["wlan0"]["access-points"].items()
    assert name == 'the "net": #1'
    assert point["password"] == "correct horse"
    assert network["wifis"]["wlan0"]["optional"]
    assert "wifis" not in cloudinit.network_config(device())["network"]


def instance(one: Any, **settings: Any) -> str:
    parts = {part.path: part.source for part in cloudinit.card(one, payload(one, **settings))}
    text = parts[cloudinit.META_DATA]
    assert isinstance(text, bytes)
    return str(yaml.safe_load(text)["instance-id"])


def test_the_instance_is_new_when_and_only_when_something_is() -> None:
    wifi = device(wifi=Wifi.of("net", "correct horse", "DE"))
    same = [instance(wifi), instance(wifi)]
    assert same[0] == same[1]
    rekeyed = device(wifi=Wifi.of("net", "another horse", "DE"))
    assert len({same[0], instance(rekeyed), instance(wifi, preset="exact"), instance(device())}) == 4


def test_what_people_see_holds_no_wifi_key() -> None:
    wifi = Wifi.of("net", "correct horse", "DE")
    shown = cloudinit.masked(device(wifi=wifi))
    assert wifi.password not in shown
    assert "***" in shown
    # Masking a copy has not touched what is written.
    parts = {part.path: part for part in cloudinit.card(device(wifi=wifi), payload(device(wifi=wifi)))}
    assert wifi.password.encode() in parts[cloudinit.NETWORK].source  # type: ignore[operator]
    assert parts[cloudinit.NETWORK].secret
