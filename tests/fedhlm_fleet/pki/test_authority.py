"""The authority: what it signs, what it refuses, and what is left when it is interrupted."""

import json
import ssl
import stat
import string
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhlm.errors import ConfigError
from fedhlm.process.files import PUBLIC
from fedhlm_fleet.pki import authority, files
from fedhlm_fleet.pki.authority import create, issue, renew_crl, revoke
from fedhlm_fleet.pki.files import PkiError
from fedhlm_fleet.pki.registry import EXPIRING, Registry
from fedhlm_fleet.pki.roles import CertificateRole

NOW = datetime(2026, 5, 4, 12, 30, 7, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    folder = tmp_path / "pki"
    assert create(folder, now=NOW)
    return folder


def cert_of(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def crl_of(folder: Path) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_ca_signs_certificates_and_lists_and_no_other_ca(pki: Path) -> None:
    ca = cert_of(pki / "ca.crt")
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (True, True, False)
    assert isinstance(ca.public_key(), ec.EllipticCurvePublicKey)
    assert ca.not_valid_after_utc == NOW + 3_650 * DAY
    assert mode_of(pki / "ca.key") == 0o600
    assert len(list(crl_of(pki))) == 0


ISSUED: list[tuple[str, CertificateRole, tuple[str, ...], tuple[str, ...]]] = [
    ("porch", "agent", ("home", "barn"), ()),
    ("edge-home", "edge", ("home",), ()),
    ("cloud", "cloud", (), ()),
    ("desk", "client", (), ()),
    ("eye", "observer", (), ()),
    ("mqtt", "broker", (), ("localhost", "127.0.0.1", "::1", "a.example")),
]


@pytest.mark.parametrize(("name", "role", "clusters", "hosts"), ISSUED)
def test_a_certificate_says_who_and_what_for(
    pki: Path, name: str, role: CertificateRole, clusters: tuple[str, ...], hosts: tuple[str, ...]
) -> None:
    made = issue(pki, name, role=role, clusters=clusters, hosts=hosts, now=NOW)
    cert = cert_of(made.cert)
    assert cert.subject.rfc4514_string() == f"CN={name}"
    purposes = list(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == [ExtendedKeyUsageOID.SERVER_AUTH if role == "broker" else ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    if hosts:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(name.value) for name in names] == list(hosts)
    assert cert.not_valid_after_utc == NOW + 365 * DAY
    assert f"{cert.serial_number:x}" == Registry.load(pki).entries[name].newest.serial
    assert mode_of(made.key) == 0o600
    # A second implementation's opinion, at its strictest.
    purpose = "sslserver" if role == "broker" else "sslclient"
    checked = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-crl_check", "-purpose", purpose, "-attime", str(int(NOW.timestamp())),
         "-CAfile", pki / "ca.crt", "-CRLfile", pki / "crl.pem", made.cert],
        capture_output=True, text=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    ssl.create_default_context(cafile=str(made.ca)).load_cert_chain(made.cert, made.key)


def test_serial_numbers_are_random(pki: Path) -> None:
    serials = [
        int(issue(pki, f"a{n}", role="agent", clusters=["c"], now=NOW).entry.newest.serial, 16) for n in range(8)
    ]
    assert len(set(serials)) == len(serials)
    assert all(serial.bit_length() > 100 for serial in serials)


def test_making_it_twice_changes_nothing(pki: Path) -> None:
    before = {p.name: p.read_bytes() for p in pki.iterdir() if p.is_file()}
    assert not create(pki, now=NOW + DAY)
    assert {p.name: p.read_bytes() for p in pki.iterdir() if p.is_file()} == before


def test_a_name_is_issued_once_and_renewed_on_demand(pki: Path) -> None:
    first = issue(pki, "porch", role="agent", clusters=["home"], now=NOW)
    old = first.cert.read_bytes()
    with pytest.raises(PkiError, match=r"'porch' was issued already as agent.*--renew"):
        issue(pki, "porch", role="agent", clusters=["home"], now=NOW)
    assert first.cert.read_bytes() == old
    again = issue(pki, "porch", renew=True, now=NOW + 300 * DAY)
    assert again.cert.read_bytes() != old
    assert (again.entry.role, again.entry.clusters) == ("agent", ("home",))
    assert again.former == first.entry.certificates
    assert [c.state(NOW + 301 * DAY) for c in again.entry.certificates] == ["valid", "valid"]
    with pytest.raises(PkiError, match=r"nothing was issued to 'prch': did you mean 'porch'\?"):
        issue(pki, "prch", renew=True, now=NOW)
    with pytest.raises(ConfigError, match="'porch' is agent in a certificate that is still good"):
        issue(pki, "porch", role="client", renew=True, now=NOW)


def test_revoking_takes_back_every_certificate_of_a_name(pki: Path) -> None:
    issue(pki, "porch", role="agent", clusters=["home"], now=NOW)
    issue(pki, "porch", renew=True, now=NOW)
    issue(pki, "kept", role="agent", clusters=["home"], now=NOW)
    assert len(revoke(pki, "porch", superseded=True, now=NOW)) == 1
    assert len(revoke(pki, "porch", now=NOW + DAY)) == 1
    assert revoke(pki, "porch", now=NOW + 2 * DAY) == ()
    entries = Registry.load(pki).entries
    assert {f"{c.serial_number:x}" for c in crl_of(pki)} == {c.serial for c in entries["porch"].certificates}
    assert [c.revoked for c in entries["porch"].certificates] == [NOW, NOW + DAY]
    assert entries["kept"].newest.state(NOW) == "valid"
    # The name of a lost device goes to the one that replaces it.
    assert issue(pki, "porch", role="client", now=NOW).entry.newest.state(NOW) == "valid"
    with pytest.raises(PkiError, match="nothing was issued to 'x'"):
        revoke(pki, "x", now=NOW)


def test_a_list_has_a_number_that_grows_and_an_end(pki: Path) -> None:
    ca = cert_of(pki / "ca.crt").public_key()
    assert isinstance(ca, ec.EllipticCurvePublicKey)
    numbers = []
    for day in range(3):
        until = renew_crl(pki, now=NOW + day * DAY)
        crl = crl_of(pki)
        assert crl.is_signature_valid(ca)
        assert crl.next_update_utc == until == authority.crl_until(pki) == NOW + (day + 400) * DAY
        assert crl.last_update_utc < NOW + day * DAY
        numbers.append(crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
    assert numbers == sorted(set(numbers))


def test_states_follow_the_clock(pki: Path) -> None:
    newest = issue(pki, "porch", role="agent", clusters=["home"], days=100, now=NOW).entry.newest
    end = NOW + 100 * DAY
    moments = [NOW, end - EXPIRING - timedelta(seconds=1), end - EXPIRING, end - timedelta(seconds=1), end]
    assert [newest.state(m) for m in moments] == ["valid", "valid", "expiring", "expiring", "expired"]


def test_nothing_outlives_the_ca(pki: Path) -> None:
    late = NOW + 3_600 * DAY
    made = issue(pki, "porch", role="agent", clusters=["home"], now=late)
    assert made.clipped
    assert made.entry.newest.not_after == NOW + 3_650 * DAY
    with pytest.raises(PkiError, match="expired on 2036-05-01"):
        issue(pki, "x", role="agent", clusters=["home"], now=NOW + 3_650 * DAY)
    with pytest.raises(PkiError, match="set the clock"):
        issue(pki, "x", role="agent", clusters=["home"], now=NOW - 2 * DAY)


BAD: list[tuple[str, CertificateRole | None, tuple[str, ...], tuple[str, ...], str]] = [
    ("a+", "agent", ("home",), (), "NAME must be .*got 'a\\+'"),
    ("../x", "agent", ("home",), (), "NAME"),
    ("", "client", (), (), "NAME"),
    ("a" * 65, "client", (), (), "NAME"),
    ("porch", "agent", (), (), "--cluster"),
    ("porch", "agent", ("a/b",), (), "--cluster must be .*got 'a/b'"),
    ("porch", None, ("home",), (), "--role"),
    ("edge-barn", "edge", ("home",), (), "must be 'edge-home'"),
    ("edge-home", "edge", ("home", "barn"), (), "must be one cluster"),
    ("porch", "cloud", (), (), "must be 'cloud'"),
    ("cloud", "cloud", ("home",), (), "must be left out"),
    ("cloud", "agent", ("home",), (), "must be another name"),
    ("edge-home", "client", (), (), "must be another name"),
    ("mqtt", "broker", (), (), "--dns"),
    ("mqtt", "broker", (), ("a b",), "--dns must be .*got 'a b'"),
    ("mqtt", "broker", (), ("1.2.3.999",), "--dns"),
    ("mqtt", "broker", (), ("*.example",), "--dns"),
    ("porch", "agent", ("home",), ("localhost",), "only brokers have host names"),
]


@pytest.mark.parametrize(("name", "role", "clusters", "hosts", "words"), BAD)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    pki: Path, name: str, role: CertificateRole | None, clusters: tuple[str, ...], hosts: tuple[str, ...], words: str
) -> None:
    before = (pki / "registry.json").read_bytes()
    with pytest.raises(ConfigError, match=words):
        issue(pki, name, role=role, clusters=clusters, hosts=hosts, now=NOW)
    assert (pki / "registry.json").read_bytes() == before
    assert not (pki / "issued").exists()


def test_an_unusable_ca_is_named(pki: Path, tmp_path: Path) -> None:
    def attempt(folder: Path = pki) -> None:
        issue(folder, "x", role="client", now=NOW)

    with pytest.raises(PkiError, match=r"must hold ca\.crt: `fedhlm pki init"):
        attempt(tmp_path / "nowhere")
    good = (pki / "ca.key").read_bytes()
    (pki / "ca.key").write_bytes(good[:50])
    with pytest.raises(PkiError, match=r"ca\.key must be an unencrypted PEM key"):
        attempt()
    create(tmp_path / "other", now=NOW)
    (pki / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(PkiError, match=r"ca\.key is not the key of .*ca\.crt"):
        attempt()
    (pki / "ca.key").unlink()
    with pytest.raises(PkiError, match=r"cannot read the CA's key .*No such file"):
        attempt()
    (pki / "ca.key").write_bytes(good)
    attempt()


@given(st.integers(0, 400), st.sampled_from(["cut", "flip"]))
@settings(max_examples=25)
def test_a_damaged_registry_is_never_taken_for_an_empty_one(
    tmp_path_factory: pytest.TempPathFactory, at: int, how: str
) -> None:
    folder = tmp_path_factory.mktemp("pki")
    Registry.empty().save(folder)
    path = folder / "registry.json"
    data = path.read_bytes()
    at %= len(data) - 2  # the last bytes are the closing brace and the line's end
    path.write_bytes(data[:at] if how == "cut" else data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])
    with pytest.raises(PkiError, match=r"registry\.json"):
        Registry.load(folder)
    assert path.exists()


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_crash_while_issuing_leaves_nothing_that_cannot_be_revoked(
    pki: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = 0
    whole = files.write

    def crash(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
        nonlocal writes
        writes += 1
        if writes == failing:
            raise KeyboardInterrupt
        whole(path, data, mode=mode)

    monkeypatch.setattr(files, "write", crash)
    with pytest.raises(KeyboardInterrupt):
        issue(pki, "porch", role="agent", clusters=["home"], now=NOW)
    monkeypatch.undo()
    known = {c.serial for e in Registry.load(pki).entries.values() for c in e.certificates}
    signed = {f"{cert_of(path).serial_number:x}" for path in pki.glob("issued/*/porch.crt")}
    assert signed <= known
    made = issue(pki, "porch", role="agent", clusters=["home"], renew=bool(known), now=NOW)
    ssl.create_default_context().load_cert_chain(made.cert, made.key)


def test_two_at_a_time_lose_nothing(pki: Path) -> None:
    def work(prefix: str) -> None:
        for number in range(8):
            issue(pki, f"{prefix}{number}", role="client", now=NOW)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in string.ascii_lowercase[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Registry.load(pki).entries) == 32


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PkiError, match="must be a writable folder"):
        create(tmp_path / "file" / "pki", now=NOW)


def test_the_registry_is_for_people_too(pki: Path) -> None:
    issue(pki, "porch", role="agent", clusters=["home"], now=NOW)
    entry = json.loads((pki / "registry.json").read_text("utf-8"))["entries"]["porch"]
    assert entry["certificates"][0]["not_after"] == "2027-05-04T12:30:07Z"
