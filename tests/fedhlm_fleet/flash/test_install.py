"""install.sh run for real under a root of its own: what is installed, with which rights, again, damaged, and consumed."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fedhlm_fleet.flash import bundle, cloudinit, plan
from fedhlm_fleet.flash.image import BootPartition, Folder
from fedhlm_fleet.flash.plan import Device, Tls, Wifi
from tests.fedhlm_fleet.flash import cards

TLS = Tls(b"the authority", b"the certificate", b"the key")


def laid_out(folder: Path, wheels: Path, **given: Any) -> Path:
    """A boot partition's files in a folder."""
    extra = {name: given.pop(name) for name in ("interpreter", "model") if name in given}
    tls = given.pop("tls", TLS)
    device = Device.of(**{"agent": "porch", "cluster": "home", "broker": "mqtts://edge", **given})
    parts = bundle.parts(sorted(wheels.glob("*.whl")), **extra)
    made = plan.payload(device, tls=tls, settings={}, bundle=parts, units=bundle.shipped_units(), made_s=1)
    folder.mkdir(exist_ok=True)
    Folder(folder).put(cloudinit.card(device, made))
    return folder


def install(boot: Path, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root.mkdir(exist_ok=True)
    environ = {"PATH": os.environ["PATH"], "FEDHLM_ROOT": str(root), "HOME": str(root)}
    command: list[str | Path] = ["sh", boot / "fedhlm" / "install.sh", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def installed(boot: Path, root: Path, *arguments: str) -> str:
    done = install(boot, root, *arguments)
    assert done.returncode == 0, done
    return done.stdout


def says(root: Path) -> str:
    return subprocess.run([root / "opt/fedhlm/bin/fedhlm"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cards.wheels(tmp_path_factory.mktemp("wheels"), says="one")


def test_a_card_read_back_installs_a_program_that_runs(wheels: Path, tmp_path: Path) -> None:
    wifi = Wifi.of("net", "correct horse", "DE")
    card = cards.make(tmp_path / "sd.img")
    files = laid_out(tmp_path / "files", wheels, wifi=wifi)
    BootPartition(card).put([plan.PlannedFile(str(f.relative_to(files)), f) for f in files.rglob("*") if f.is_file()])
    cards.take_out(card, tmp_path / "boot")
    boot, root = tmp_path / "boot", tmp_path / "root"
    assert wifi.password in (boot / "network-config").read_text()
    installed(boot, root, "--consume")
    assert says(root) == "one"
    secrets = {"agent.toml": None, "tls/ca.crt": TLS.ca, "tls/client.crt": TLS.cert, "tls/client.key": TLS.key}
    for name, content in secrets.items():
        file = root / "etc/fedhlm" / name
        assert file.stat().st_mode & 0o777 == 0o600
        assert content in (None, file.read_bytes())
    assert (root / "etc/fedhlm/tls").stat().st_mode & 0o777 == 0o700
    unit = root / "etc/systemd/system/fedhlm-agent.service"
    assert unit.read_bytes() == bundle.shipped_units()[plan.UNIT]
    # Nothing secret stays where every user can read it, and cloud-init is told to leave the network alone.
    assert sorted(path.name for path in boot.iterdir()) == [
        "cmdline.txt",
        "config.txt",
        "meta-data",
        "network-config",
        "user-data",
    ]
    assert (boot / "network-config").read_text() == "network:\n  config: disabled\n"


def test_the_program_can_be_run_by_anybody(wheels: Path, tmp_path: Path) -> None:
    installed(laid_out(tmp_path / "boot", wheels), tmp_path / "root")
    target = (tmp_path / "root/opt/fedhlm").resolve()
    unreadable = [path for path in target.rglob("*") if not path.is_symlink() and not path.stat().st_mode & 0o004]
    assert unreadable == []


def test_again_changes_nothing_and_another_bundle_takes_over(wheels: Path, tmp_path: Path) -> None:
    boot, root = laid_out(tmp_path / "boot", wheels), tmp_path / "root"
    installed(boot, root)
    first = (root / "opt/fedhlm").resolve()
    stamp = (first / "bin/fedhlm").stat().st_mtime_ns
    assert "installing into" not in installed(boot, root)
    assert (first / "bin/fedhlm").stat().st_mtime_ns == stamp
    installed(laid_out(tmp_path / "next", cards.wheels(tmp_path / "wheels", says="two")), root)
    assert says(root) == "two"
    assert not first.exists()


def test_a_first_boot_that_was_cut_off_is_taken_up_again(wheels: Path, tmp_path: Path) -> None:
    boot, root = laid_out(tmp_path / "boot", wheels), tmp_path / "root"
    digest = (boot / "fedhlm/bundle.id").read_text().strip()
    half = root / f"opt/fedhlm-{digest}/bin"
    half.mkdir(parents=True)
    (half / "fedhlm").write_text("half a file")
    installed(boot, root)
    assert says(root) == "one"


def test_a_damaged_bundle_is_refused_before_anything_changes(wheels: Path, tmp_path: Path) -> None:
    boot, root = laid_out(tmp_path / "boot", wheels), tmp_path / "root"
    (damaged, *_) = (boot / "fedhlm/wheels").glob("numpy*")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    done = install(boot, root, "--consume")
    assert done.returncode == 1
    assert "damaged" in done.stderr
    assert list(root.iterdir()) == []
    assert (boot / "fedhlm").is_dir()


def test_a_program_that_does_not_start_never_replaces_one_that_does(wheels: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    installed(laid_out(tmp_path / "boot", wheels), root)
    broken = tmp_path / "broken"
    cards.wheels(broken, leave_out=("fedhlm",))
    cards.wheel(broken, "fedhlm", {"stand_in.py": "def main():\n    raise SystemExit(3)\n"})
    assert install(laid_out(tmp_path / "next", broken), root).returncode != 0
    assert says(root) == "one"


def test_a_folder_made_by_hand_is_put_aside(wheels: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "opt/fedhlm/bin").mkdir(parents=True)
    (root / "opt/fedhlm/bin/mine").touch()
    installed(laid_out(tmp_path / "boot", wheels), root)
    assert says(root) == "one"
    assert (root / "opt/fedhlm.before/bin/mine").exists()


def test_a_plain_broker_brings_its_drop_in_and_tls_takes_it_away(wheels: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    drop_in = root / "etc/systemd/system/fedhlm-agent.service.d/plain.conf"
    installed(laid_out(tmp_path / "boot", wheels, broker="mqtt://edge", tls=None), root)
    assert drop_in.exists()
    installed(laid_out(tmp_path / "next", wheels), root)
    assert not drop_in.exists()


def test_a_bundled_interpreter_is_used(wheels: Path, tmp_path: Path) -> None:
    program = tmp_path / "python3"
    program.write_text(f'#!/bin/sh\n: >"{tmp_path}/used"\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    archive = tmp_path / "python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(program, "python/bin/python3")
    installed(laid_out(tmp_path / "boot", wheels, interpreter=archive), tmp_path / "root")
    assert (tmp_path / "used").exists()
    assert says(tmp_path / "root") == "one"
