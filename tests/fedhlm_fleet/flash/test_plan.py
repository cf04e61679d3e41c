"""What a device gets: derived keys, checked names, digests that name content, and nothing secret in sight."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.errors import ConfigError
from fedhlm.protocol.fields import NAME_PATTERN
from fedhlm_fleet.flash import bundle, plan, toml
from fedhlm_fleet.flash.plan import Device, PlannedFile, Tls, Wifi

SCALARS = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text())
TABLES = st.recursive(
    st.dictionaries(st.text(), SCALARS | st.lists(SCALARS), max_size=4),
    lambda inner: st.dictionaries(st.text(), SCALARS | inner, max_size=4),
    max_leaves=8,
)
TLS = Tls(b"the authority", b"the certificate", b"the key")


def device(**given: Any) -> Device:
    return Device.of(**{"agent": "porch", "cluster": "home", "broker": "mqtts://edge:8883", **given})


def payload(one: Device, *, tls: Tls | None = TLS, made_s: int = 0, **settings: object) -> plan.Payload:
    parts = [PlannedFile("wheels/a.whl", b"a"), PlannedFile("wheels/b.whl", b"b")]
    units = bundle.shipped_units()
    return plan.payload(one, tls=tls, settings=settings, bundle=parts, units=units, made_s=made_s)


@given(TABLES)
def test_written_toml_reads_back_equal(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml.encode(table)) == table


def test_a_passphrase_stays_what_it_is_and_a_key_is_a_key() -> None:
    """WPA3 derives its key from the passphrase; one that WPA2 has derived (IEEE 802.11i-2004, H.4.1) is of no use there."""
    key = "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    assert Wifi.of("IEEE", "password", "US").password == "password"
    assert Wifi.of("IEEE", key.upper(), "US").password == key


@pytest.mark.parametrize("password", ["short", "x" * 64, "x" * 70, "tab\tin the middle", "ümlaut-password"])
def test_impossible_wifi_passwords_are_refused_unseen(password: str) -> None:
    with pytest.raises(ConfigError, match="--wifi-password-file") as caught:
        Wifi.of("net", password, "DE")
    assert password not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("agent", "a/b", "--agent"),
        ("agent", "", "--agent"),
        ("cluster", "no cluster", "--cluster"),
        ("broker", "http://edge", "--broker"),
        ("broker", "mqtts://me:secret@edge", "--broker"),
        ("hostname", "-porch", "--hostname"),
        ("user", "Root!", "--user"),
        ("ssh_key", "ssh-ed25519 AAAA\nssh-ed25519 BBBB", "--ssh-key"),
    ],
)
def test_what_cannot_be_is_refused_by_the_flag_s_name(key: str, value: str, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag) as caught:
        device(**{key: value})
    assert "secret" not in str(caught.value)


@given(st.from_regex(NAME_PATTERN, fullmatch=True))
def test_every_agent_has_a_host_name(agent: str) -> None:
    assert plan._HOSTNAME.fullmatch(device(agent=agent).hostname)


def test_the_digest_names_content_not_the_moment() -> None:
    first, later = payload(device(), made_s=1), payload(device(), made_s=2)
    assert first.digest == later.digest
    others = [
        payload(device(agent="roof")),
        payload(device(), tls=TLS._replace(key=b"another")),
        payload(device(), generation={"seed": 3}),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 4


def test_the_device_s_names_stand_over_its_configuration_file() -> None:
    made = payload(device(), agent={"id": "other", "threads": 2}, preset="exact")
    (text,) = [part.source for part in made.parts if part.path == plan.CONFIGURATION]
    assert isinstance(text, bytes)
    assert tomllib.loads(text.decode()) == {
        "preset": "exact",
        "agent": {"id": "porch", "threads": 2},
        "broker": {"url": "mqtts://edge:8883"},
        "cluster": {"name": "home"},
    }


def test_tls_without_a_certificate_is_refused_and_plain_needs_none() -> None:
    with pytest.raises(ConfigError, match="--pki"):
        payload(device(), tls=None)
    plain = {part.path for part in payload(device(broker="mqtt://edge"), tls=None).parts}
    assert plan.PLAIN in plain
    assert not any(path.startswith("tls/") for path in plain)


def test_a_device_with_a_gpu_gets_the_drop_in_that_lets_it_be_seen() -> None:
    for providers, there in (((), False), (("CPUExecutionProvider",), False), (("CUDAExecutionProvider",), True)):
        paths = {part.path for part in payload(device(), agent={"providers": list(providers)}).parts}
        assert (plan.CUDA in paths) is there


def test_secrets_show_in_no_repr() -> None:
    wifi = Wifi.of("net", "correct horse", "DE")
    made = payload(device(wifi=wifi))
    shown = repr((device(wifi=wifi), TLS, made, PlannedFile("x", b"the key", secret=True)))
    assert wifi.password not in shown
    assert "the key" not in shown
    assert [part.path for part in made.parts if part.secret] == [plan.CONFIGURATION, "tls/client.key"]


def test_the_shipped_units_are_those_of_deploy() -> None:
    deploy = Path(__file__).parents[3] / "deploy" / "systemd"
    units = bundle.shipped_units()
    for name in (plan.UNIT, plan.PLAIN, plan.CUDA):
        assert units[name] == (deploy / name).read_bytes()
