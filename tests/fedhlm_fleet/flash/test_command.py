"""`fedhlm flash` as operators meet it, with a real PKI: certificates, dry run, manifest, errors of one line, no secret anywhere."""

import hashlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fedhlm_fleet.flash import credentials
from fedhlm_fleet.flash.plan import FlashError
from fedhlm_fleet.pki import authority
from fedhlm_fleet.pki.registry import Registry
from tests.fedhlm_fleet.flash import cards

PROGRAM = Path(sys.executable).with_name("fedhlm")
PASSWORD = "correct horse battery"
NOW = datetime.now(UTC)


class Workshop:
    """A folder with an image, wheels, a PKI and a Wi-Fi password."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = cards.make(folder / "sd.img")
        self.wheels = cards.wheels(folder / "wheels")
        self.pki = folder / "pki"
        authority.create(self.pki, now=NOW)
        self.password = folder / "wifi"
        self.password.write_text(f"{PASSWORD}\n")

    def flash(self, *arguments: str | Path, agent: str = "porch") -> subprocess.CompletedProcess[str]:
        fixed: list[str | Path] = [
            "--agent",
            agent,
            "--cluster",
            "home",
            "--broker",
            "mqtts://edge",
            "--wheels",
            self.wheels,
        ]
        wifi: list[str | Path] = ["--wifi-ssid", "net", "--wifi-country", "DE", "--wifi-password-file", self.password]
        command: list[str | Path] = [PROGRAM, "flash", *fixed, *wifi, *arguments]
        environ = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        return subprocess.run(
            command, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_a_card_gets_a_certificate_of_its_own_once(workshop: Workshop) -> None:
    for _ in range(2):
        done = workshop.flash("--image", workshop.image, "--pki", workshop.pki)
        assert done.returncode == 0, done
        certificate = x509.load_pem_x509_certificate(cards.read(workshop.image, "fedhlm/tls/client.crt").encode())
        assert certificate.subject.rfc4514_string() == "CN=porch"
    entry = Registry.load(workshop.pki).entry("porch")
    assert len(entry.certificates) == 1
    assert entry.clusters == ("home",)
    key = (workshop.pki / "issued/porch/porch.key").read_text()
    assert cards.read(workshop.image, "fedhlm/tls/client.key") == key
    assert f'password: "{PASSWORD}"' in cards.read(workshop.image, "network-config")
    assert workshop.image.read_bytes().count(PASSWORD.encode()) == 1


def test_a_dry_run_changes_nothing_and_shows_no_secret(workshop: Workshop) -> None:
    before = workshop.image.read_bytes()
    done = workshop.flash("--image", workshop.image, "--pki", workshop.pki, "--dry-run")
    assert done.returncode == 0, done
    assert "fedhlm/tls/client.key  (secret)" in done.stdout
    assert 'password: "***"' in done.stdout
    assert PASSWORD not in done.stdout + done.stderr
    assert workshop.image.read_bytes() == before
    assert "porch" not in Registry.load(workshop.pki).entries


def test_many_cards_and_their_manifest(workshop: Workshop) -> None:
    orders = workshop.folder / "cards.csv"
    orders.write_text("agent,hostname\nporch,pi-porch\nroof,\n")
    manifest = workshop.folder / "list.rpi-imager-manifest"
    out = workshop.folder / "out"
    done = workshop.flash(
        "--csv",
        orders,
        "--image",
        workshop.image,
        "--out",
        out,
        "--pki",
        workshop.pki,
        "--manifest",
        manifest,
        agent="",
    )
    assert done.returncode == 0, done
    assert "[2/2] roof: " in done.stdout
    listed = json.loads(manifest.read_text())["os_list"]
    needed = {
        "name",
        "description",
        "icon",
        "url",
        "extract_size",
        "extract_sha256",
        "image_download_size",
        "release_date",
    }
    for entry, name in zip(listed, ("porch", "roof"), strict=True):
        image = out / f"{name}.img"
        assert needed <= entry.keys()
        assert entry["url"] == image.as_uri()
        assert entry["extract_size"] == image.stat().st_size
        assert entry["extract_sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
        assert entry["init_format"] == "none"
    assert 'hostname: "pi-porch"' in cards.read(out / "porch.img", "user-data")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--image", "{image}"), "--pki must be a PKI folder"),
        (("--image", "{image}", "--pki", "{wheels}"), "pki init"),
        (("--image", "{wheels}/none.img", "--pki", "{pki}"), "cannot read"),
        (("--device", "{image}", "--pki", "{pki}"), "a disk such as /dev/sdX"),
        (("--device", "/dev/null", "--pki", "{pki}", "--yes"), "a disk such as /dev/sdX"),
        (("--boot", "{wheels}", "--pki", "{pki}"), "cmdline.txt"),
        (("--boot", "{wheels}", "--manifest", "m", "--pki", "{pki}"), "--manifest"),
        (("--image", "{image}", "--pki", "{pki}", "--python", "3.14"), "3.14"),
        (("--image", "{image}", "--pki", "{pki}", "--wheels", "{pki}"), "wheels"),
        (("--csv", "{wheels}/none.csv", "--image", "{image}"), "cannot read"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(arguments: tuple[str, ...], said: str, workshop: Workshop) -> None:
    names = {"image": workshop.image, "wheels": workshop.wheels, "pki": workshop.pki}
    before = workshop.image.read_bytes()
    done = workshop.flash(*(word.format(**names) for word in arguments))
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert workshop.image.read_bytes() == before


def test_certificates_that_do_not_fit_are_refused(workshop: Workshop) -> None:
    pki = workshop.pki
    made = authority.issue(pki, "porch", role="agent", clusters=("home",), now=NOW)
    other = authority.issue(pki, "edge-home", role="edge", clusters=("home",), now=NOW)
    stranger = workshop.folder / "stranger"
    authority.create(stranger, now=NOW)
    assert credentials.from_files(made.cert, made.key, made.ca, agent="porch", now=NOW).key == made.key.read_bytes()
    later = NOW + timedelta(days=366)
    for files, agent, now, said in (
        ((made.cert, made.key, made.ca), "roof", NOW, "must be the certificate of roof .got that of porch"),
        ((made.cert, other.key, made.ca), "porch", NOW, "is not the key"),
        ((made.cert, made.key, stranger / "ca.crt"), "porch", NOW, "was not made by"),
        ((made.cert, made.key, made.ca), "porch", later, "good until"),
        ((made.key, made.key, made.ca), "porch", NOW, "certificates in PEM"),
        ((made.cert, made.cert, made.ca), "porch", NOW, "a private key in PEM"),
    ):
        with pytest.raises(FlashError, match=said):
            credentials.from_files(*files, agent=agent, now=now)
    for agent, cluster, said in (
        ("edge-home", "home", "got edge of home"),
        ("porch", "barn", "must be an agent of barn"),
    ):
        with pytest.raises(FlashError, match=said):
            credentials.from_pki(pki, agent, cluster, now=NOW)
    authority.revoke(pki, "porch", now=NOW)
    with pytest.raises(FlashError, match="expired or revoked"):
        credentials.from_pki(pki, "porch", "home", now=NOW)
