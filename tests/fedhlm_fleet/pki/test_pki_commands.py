"""`fedhlm pki` as an operator types it: what is printed, exit codes, typos, and folders that a broker can take."""

import json
import re
import stat
from pathlib import Path

import pytest

from fedhlm.config import load
from fedhlm_fleet.cli import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fedhlm(*words: str) -> int:
    return main(["pki", *words])


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert fedhlm(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fedhlm: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_from_nothing_to_a_broker(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedhlm("init") == 0
    assert fedhlm("issue", "mqtt", "--role", "broker", "--dns", "cloud.example", "10.0.0.2") == 0
    assert fedhlm("issue", "edge-home", "--role", "edge") == 0
    capsys.readouterr()
    assert fedhlm("issue", "porch", "--role", "agent", "--cluster", "home") == 0
    keys = dict(re.findall(r"^(broker\.\w+) +(.+)$", capsys.readouterr().out, re.MULTILINE))
    assert set(keys) == {"broker.ca", "broker.cert", "broker.key"}
    # What is printed is what the configuration takes.
    broker = load(environ={}, flags={**keys, "broker.url": "mqtts://cloud.example"}).config.broker
    assert broker.address().ssl_context() is not None
    assert fedhlm("mosquitto", "--all", "--out", "etc", "--at", "/mosquitto/config", "--data", "/mosquitto/data") == 0
    assert {p.name for p in (here / "etc").iterdir()} == {
        "mosquitto.conf", "acl", "ca.crt", "crl.pem", "broker.crt", "broker.key"
    }  # fmt: skip
    assert stat.S_IMODE((here / "etc" / "broker.key").stat().st_mode) == 0o600
    lines = (here / "etc" / "mosquitto.conf").read_text("utf-8").splitlines()
    for line in (
        "listener 8883",
        "require_certificate true",
        "allow_anonymous false",
        "use_identity_as_username true",
        "crlfile /mosquitto/config/crl.pem",
        "acl_file /mosquitto/config/acl",
        "max_packet_size 8519680",
        "max_queued_bytes 16777216",
        "memory_limit 268435456",
        "persistence_location /mosquitto/data/",
    ):
        assert line in lines
    assert "ca.key" not in "".join(p.name for p in (here / "etc").iterdir())


def test_init_and_if_missing_may_be_repeated(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedhlm("init", "ca") == fedhlm("init", "ca") == 0
    assert "nothing changed, there is a CA in ca" in capsys.readouterr().out
    words = ("issue", "porch", "--role", "agent", "--cluster", "home", "--pki", "ca", "--if-missing")
    assert fedhlm(*words) == 0
    before = (here / "ca" / "registry.json").read_bytes()
    assert fedhlm(*words) == 0
    assert "nothing changed, porch is issued until" in capsys.readouterr().out
    assert (here / "ca" / "registry.json").read_bytes() == before
    other = tuple("barn" if word == "home" else word for word in words)
    assert "NAME must be a name that is not issued yet, unless with --renew (got 'porch': agent home)" in refused(
        capsys, *other
    )


@pytest.mark.usefixtures("here")
def test_typos_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    fedhlm("init")
    fedhlm("issue", "porch", "--role", "agent", "--cluster", "home")
    assert "did you mean 'porch'" in refused(capsys, "revoke", "proch")
    assert "did you mean 'agent'" in refused(capsys, "issue", "x", "--role", "agnet")
    assert "did you mean list?" in refused(capsys, "lsit")
    assert "--renew replaces" in refused(capsys, "issue", "porch", "--role", "agent", "--cluster", "home")
    assert "must hold ca.crt" in refused(capsys, "list", "--pki", "nowhere")
    assert "must be exactly one of them" in refused(capsys, "mosquitto", "--out", "x")
    assert "must be exactly one of them" in refused(capsys, "mosquitto", "--out", "x", "--cloud", "--all")
    told = refused(capsys, "mosquitto", "--cluster", "home", "--out", "x")
    assert "fedhlm pki issue broker-home --role broker --cluster home --dns HOST" in told
    assert "got 'porch' of role agent" in refused(capsys, "mosquitto", "--all", "--broker", "porch", "--out", "x")
    fedhlm("issue", "one", "--role", "broker", "--dns", "a")
    assert "an absolute path" in refused(capsys, "mosquitto", "--all", "--out", "x", "--at", "relative")
    fedhlm("issue", "two", "--role", "broker", "--dns", "b")
    assert "--broker must be one of one, two" in refused(capsys, "mosquitto", "--all", "--out", "x")


@pytest.mark.usefixtures("here")
def test_the_list_shows_everybody_and_what_runs_out(capsys: pytest.CaptureFixture[str]) -> None:
    fedhlm("init")
    fedhlm("issue", "porch", "--role", "agent", "--cluster", "home", "--days", "20")
    fedhlm("issue", "desk", "--role", "client")
    fedhlm("issue", "lost", "--role", "agent", "--cluster", "home", "barn")
    fedhlm("revoke", "lost")
    assert fedhlm("revoke", "lost") == 0
    assert "nothing changed, lost has no certificate left to revoke" in capsys.readouterr().out
    assert fedhlm("list") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    states = {line[0]: (line[1], line[2], line[-1]) for line in lines[1:4]}
    assert states == {
        "porch": ("agent", "home", "expiring"),
        "desk": ("client", "-", "valid"),
        "lost": ("agent", "home,barn", "revoked"),
    }
    assert fedhlm("list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["state"] for row in rows} == {name: state for name, (_, _, state) in states.items()}
    assert fedhlm("crl") == 0


def test_plain_needs_no_pki_and_stays_on_this_machine(here: Path) -> None:
    assert fedhlm("mosquitto", "--plain", "--out", "etc", "--data", str(here)) == 0
    lines = (here / "etc" / "mosquitto.conf").read_text("utf-8").splitlines()
    assert "listener 1883 127.0.0.1" in lines
    assert "allow_anonymous true" in lines
