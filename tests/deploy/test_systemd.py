"""The units: systemd's own checker is content, and what they start runs with the files that they hand over."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from fedhlm.config import load
from fedhlm_fleet.commands.common import parse_keys
from tests.brokers import MOSQUITTO, Mosquitto
from tests.fedhlm.process.test_notify import Manager

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = sorted(path.name for path in UNITS.glob("*.service"))
DROP_INS = sorted(path.name for path in UNITS.glob("*.conf"))
PROGRAM = "/opt/fedhlm/bin/fedhlm"
ANALYZE = shutil.which("systemd-analyze")
EXPOSURE_MAX = 15  # tenths; systemd-analyze security counts from 0 (tight) to 100
CREDENTIALS = ("config.toml", "ca.crt", "client.crt", "client.key")


def settings(name: str) -> dict[str, list[str]]:
    """All settings of a unit's [Service] and [Unit] sections, each with its values in order."""
    found: dict[str, list[str]] = {}
    text = re.sub(r" *\\\n *", " ", (UNITS / name).read_text("utf-8"))
    for line in text.splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def arguments(name: str, instance: str = "porch") -> list[str]:
    (line,) = settings(name)["ExecStart"]
    program, *rest = line.replace("%i", instance).split()
    assert program == PROGRAM
    return rest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file system as systemd would see it, with our units and a program of the right name."""
    if ANALYZE is None:
        pytest.skip("systemd-analyze is not installed")
    root = tmp_path_factory.mktemp("root")
    (root / "etc/systemd/system").mkdir(parents=True)
    (root / "usr/lib/systemd").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(UNITS / name, root / "etc/systemd/system")
    shutil.copytree("/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True)
    program = root / PROGRAM.lstrip("/")
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return root


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    assert ANALYZE is not None
    return subprocess.run([ANALYZE, *words], capture_output=True, text=True, check=False)


def instance_of(name: str) -> str:
    return name.replace("@.", "@porch.")


@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_nothing_to_complain_of(name: str, root: Path) -> None:
    done = analyze("verify", "--man=no", f"--root={root}", instance_of(name))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_checker_sees_what_is_wrong(root: Path) -> None:
    bad = root / "etc/systemd/system/bad.service"
    bad.write_text((UNITS / NAMES[0]).read_text("utf-8").replace("WatchdogSec", "WatchDogSec"))
    done = analyze("verify", "--man=no", f"--root={root}", bad.name)
    bad.unlink()
    assert "WatchDogSec" in done.stderr


@pytest.mark.parametrize("drop_in", DROP_INS)
def test_a_drop_in_leaves_the_unit_sound(drop_in: str, root: Path) -> None:
    folder = root / "etc/systemd/system/fedhlm-agent.service.d"
    folder.mkdir()
    shutil.copy(UNITS / drop_in, folder)
    done = analyze("verify", "--man=no", f"--root={root}", "fedhlm-agent.service")
    shutil.rmtree(folder)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", NAMES)
def test_little_is_exposed(name: str, root: Path) -> None:
    done = analyze(
        "security", "--offline=yes", f"--root={root}", f"--threshold={EXPOSURE_MAX}", "--no-pager", instance_of(name)
    )
    assert done.returncode == 0, done.stdout[-400:]


@pytest.mark.parametrize("name", NAMES)
def test_every_unit_is_watched_bounded_and_confined(name: str) -> None:
    unit = settings(name)
    for key, value in {
        "Type": "notify",
        "Restart": "on-failure",
        "DynamicUser": "yes",
        "ProtectSystem": "strict",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "PrivateDevices": "yes",
        "StartLimitIntervalSec": "0",
    }.items():
        assert unit[key] == [value], key
    assert int(unit["WatchdogSec"][0]) > 0
    assert {"MemoryHigh", "MemoryMax", "StateDirectory", "RestartSec", "SystemCallFilter"} <= unit.keys()
    assert [entry.partition(":")[0] for entry in unit["LoadCredential"]] == list(CREDENTIALS)


def test_all_units_are_confined_alike() -> None:
    def confinement(name: str) -> str:
        return (UNITS / name).read_text("utf-8").partition("# Nothing of the machine")[2]

    assert len({confinement(name) for name in NAMES}) == 1
    assert confinement(NAMES[0]).strip()


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_sets_known_keys_to_the_files_handed_over(name: str, tmp_path: Path) -> None:
    role, *rest = arguments(name)
    expanded = [word.replace("${CREDENTIALS_DIRECTORY}", "/c").replace("${STATE_DIRECTORY}", "/s") for word in rest]
    place = expanded.index("--config")
    assert expanded.pop(place) == "--config"
    assert expanded.pop(place) == "/c/config.toml"
    config = load(environ={}, flags=parse_keys(expanded)).config
    assert (config.broker.ca, config.broker.cert, config.broker.key) == ("/c/ca.crt", "/c/client.crt", "/c/client.key")
    assert getattr(config, role).state == "/s"
    if role == "edge":
        assert config.edge.upstream.key == "/c/client.key"
    if "@" in name:
        assert config.agent.id == "porch"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
async def test_what_the_unit_starts_is_ready_over_tls_and_keeps_its_state(name: str, tmp_path: Path) -> None:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    ca = trustme.CA()
    server, client = ca.issue_cert("127.0.0.1"), ca.issue_cert("porch")
    files = {
        "ca.pem": ca.cert_pem.bytes(),
        "server.crt": server.cert_chain_pems[0].bytes(),
        "server.key": server.private_key_pem.bytes(),
    }
    extra = "cafile {0}/ca.pem\ncertfile {0}/server.crt\nkeyfile {0}/server.key\nrequire_certificate true"
    async with Mosquitto(files=files, extra=extra) as broker:
        url = broker.url.replace("mqtt://", "mqtts://")
        role, *rest = arguments(name)
        credentials, state = tmp_path / "credentials", tmp_path / "state"
        credentials.mkdir()
        contents = (
            f'[broker]\nurl = "{url}"\n'.encode(),
            files["ca.pem"],
            client.cert_chain_pems[0].bytes(),
            client.private_key_pem.bytes(),
        )
        for file, content in zip(CREDENTIALS, contents, strict=True):
            (credentials / file).write_bytes(content)
        places = {"CREDENTIALS_DIRECTORY": str(credentials), "STATE_DIRECTORY": str(state)}
        command = [re.sub(r"\$\{(\w+)\}", lambda found: places[found[1]], word) for word in (role, *rest)]
        manager = Manager(str(tmp_path / "notify"))
        env = {**os.environ, **places, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "30000000"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fedhlm_fleet.cli", *command, env=env, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            heard = await asyncio.to_thread(manager.hear_until, lambda m: m.get("STATUS") == "serving")
        finally:
            process.send_signal(signal.SIGTERM)
            code = await process.wait()
            manager.close()
    assert code == 0
    assert any("READY" in message for message in heard)
    assert state.is_dir()
