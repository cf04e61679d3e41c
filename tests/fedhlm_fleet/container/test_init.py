"""The init service: whoever has a folder gets its own key and nothing else, once, and brokers know everybody."""

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_doors.keys import ApiKeys
from fedhlm_fleet.container.init import API_CLIENT, API_KEYS, Owners, main, plan, provide
from fedhlm_fleet.pki import authority

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
PORT = 8883
FOLDERS = (
    "cloud",
    "cloud-broker",
    "edges/home",
    "brokers/home",
    "brokers/garden",
    "agents/home/porch",
    "agents/garden/shed",
    "clients/home/ask-home",
    "observers/console",
)
OF_PARTY = {"ca.crt", "party.crt", "party.key"}
OF_BROKER = {"ca.crt", "crl.pem", "broker.crt", "broker.key", "probe.crt", "probe.key", "mosquitto.conf", "acl"}
OWNERS = Owners(os.getuid(), os.getuid())


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    for name in FOLDERS:
        (tmp_path / "parts" / name).mkdir(parents=True)
    return tmp_path / "parts"


def run(parts: Path, now: datetime = NOW) -> list[str]:
    return list(provide(parts.parent / "pki", parts, owners=OWNERS, port=PORT, now=now))


def certificates(parts: Path) -> dict[str, x509.Certificate]:
    return {
        str(path.relative_to(parts)): x509.load_pem_x509_certificate(path.read_bytes())
        for path in sorted(parts.rglob("*.crt"))
        if path.name != "ca.crt"
    }


def test_an_agent_keeps_the_api_key_that_was_made_for_it(parts: Path) -> None:
    run(parts)
    paths = sorted(parts.rglob(API_KEYS))
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in paths)
    kept = [ApiKeys.of(str(path)).client(f"Bearer {path.read_text('utf-8').split()[1]}") for path in paths]
    assert kept == [API_CLIENT] * len(paths)
    before = [path.read_text("utf-8") for path in paths]
    assert len(set(before)) == len(before) > 1
    run(parts)
    assert [path.read_text("utf-8") for path in paths] == before


def name_of(certificate: x509.Certificate) -> str:
    (attribute,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attribute.value)


def test_every_folder_holds_its_own_pair_and_nothing_else(parts: Path) -> None:
    run(parts)
    keys: dict[bytes, Path] = {}
    for party in plan(parts):
        found = {path.name for path in party.folder.iterdir()}
        of_agent = {API_KEYS} if party.role == "agent" else set()
        assert found == (OF_BROKER if party.role == "broker" else OF_PARTY | of_agent)
        for key in party.folder.glob("*.key"):
            assert key.stat().st_mode & 0o777 == 0o600
            certificate = x509.load_pem_x509_certificate(key.with_suffix(".crt").read_bytes())
            expected = f"probe-{party.name}" if key.name == "probe.key" else party.name
            assert name_of(certificate) == expected
            private = serialization.load_pem_private_key(key.read_bytes(), None)
            assert private.public_key() == certificate.public_key()
            assert key.read_bytes() not in keys, "nobody has another one's key"
            keys[key.read_bytes()] = key
    assert len(keys) == len(FOLDERS) + 3


def test_running_again_changes_no_certificate(parts: Path) -> None:
    first, before = run(parts), certificates(parts)
    second = run(parts, NOW + timedelta(days=200))
    assert certificates(parts) == before
    assert sum("issued until" in line for line in first) == len(FOLDERS)
    assert sum("good until" in line for line in second) == len(FOLDERS)


def test_what_ends_soon_is_renewed(parts: Path) -> None:
    run(parts)
    before = certificates(parts)
    later = NOW + timedelta(days=authority.LEAF_DAYS - 20)
    lines = run(parts, later)
    after = certificates(parts)
    assert sum("renewed until" in line for line in lines) == len(FOLDERS)
    assert {name: name_of(c) for name, c in after.items()} == {name: name_of(c) for name, c in before.items()}
    for name, certificate in after.items():
        assert certificate.not_valid_after_utc > later + timedelta(days=300), name


def test_who_was_revoked_stays_without(parts: Path) -> None:
    run(parts)
    before = certificates(parts)
    authority.revoke(parts.parent / "pki", "porch", now=NOW)
    lines = run(parts, NOW + timedelta(days=1))
    assert any(line.startswith("porch: remains revoked") for line in lines)
    assert certificates(parts) == before
    rights = (parts / "brokers/home/acl").read_text("utf-8")
    assert "user porch" not in rights
    crl = x509.load_pem_x509_crl((parts / "brokers/home/crl.pem").read_bytes())
    assert [entry.serial_number for entry in crl] == [before["agents/home/porch/party.crt"].serial_number]


def test_brokers_know_the_parties_of_their_place_and_a_probe_tells_of_itself_only(parts: Path) -> None:
    run(parts)
    for folder, known, strange in (
        ("brokers/home", {"porch", "edge-home", "ask-home", "console"}, {"shed"}),
        ("brokers/garden", {"shed", "console"}, {"porch", "edge-home", "ask-home"}),
        ("cloud-broker", {"cloud", "edge-home", "console"}, {"porch", "shed"}),
    ):
        blocks = (parts / folder / "acl").read_text("utf-8").split("\n\n")
        users = {line.removeprefix("user ") for b in blocks for line in b.splitlines() if line.startswith("user ")}
        assert known <= users
        assert not strange & users
        text = (parts / folder / "mosquitto.conf").read_text("utf-8")
        assert "require_certificate true" in text
        assert "keyfile /etc/fedhlm/broker/broker.key" in text
        own = [b for b in blocks if "user probe-" in b]
        for block in own:  # it may tell of its own presence, and that at the cloud's broker only
            written = re.findall(r"^topic write (.*)$", block, re.MULTILINE)
            assert len(written) == 1
            assert re.fullmatch(r"\S+/client/probe-broker-\w+/status", written[0])
        if folder != "cloud-broker":
            assert own == []


def test_an_agent_that_comes_later_is_known_to_its_broker(parts: Path) -> None:
    run(parts)
    (parts / "agents/home/attic").mkdir()
    lines = run(parts, NOW + timedelta(days=3))
    assert [line for line in lines if "issued until" in line] == [
        f"attic: issued until {NOW + timedelta(days=368):%Y-%m-%d}"
    ]
    assert "user attic" in (parts / "brokers/home/acl").read_text("utf-8")


def test_plain_configures_brokers_and_keeps_the_apis_closed_to_who_has_no_key(parts: Path) -> None:
    user = str(os.getuid())
    given = ["--parts", str(parts), "--pki", str(parts.parent / "pki"), "--part-user", user, "--broker-user", user]
    assert main([*given, "--plain"]) == 0
    keys = sorted((parts / "agents").rglob(API_KEYS))
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in keys)
    assert sorted(str(p.relative_to(parts)) for p in parts.rglob("*") if p.is_file()) == [
        "agents/garden/shed/api.keys",
        "agents/home/porch/api.keys",
        "brokers/garden/mosquitto.conf",
        "brokers/home/mosquitto.conf",
        "cloud-broker/mosquitto.conf",
    ]
    text = (parts / "brokers/home/mosquitto.conf").read_text("utf-8")
    assert "listener 1883 0.0.0.0" in text
    assert "allow_anonymous true" in text


def test_one_name_for_two_roles_is_refused_in_one_line(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (parts / "clients/home/porch").mkdir()
    user = str(os.getuid())
    given = ["--parts", str(parts), "--pki", str(parts.parent / "pki"), "--part-user", user, "--broker-user", user]
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("init: the role of 'porch' must be client (got agent)")


@given(st.sets(st.sampled_from(FOLDERS)))
def test_the_plan_is_what_is_mounted(folders: set[str]) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as top:
        for name in folders:
            (Path(top) / name).mkdir(parents=True)
        assert {str(party.folder.relative_to(top)) for party in plan(Path(top))} == folders
