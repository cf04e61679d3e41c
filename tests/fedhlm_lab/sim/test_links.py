"""Profiles of links: the shipped ones are sane, and a user's mistake is named."""

from pathlib import Path

import pytest

from fedhlm.errors import ConfigError
from fedhlm_lab.sim import links
from fedhlm_lab.sim.link import LinkModel


def test_shipped_profiles_order_as_their_networks_do() -> None:
    found = {name: links.load(name) for name in links.names()}
    assert set(found) == {"lan", "wifi", "lte", "nb-iot", "lora-like", "satellite"}
    ordered = sorted(found, key=lambda name: found[name].round_trip_s)
    assert ordered == ["lan", "wifi", "lte", "satellite", "nb-iot", "lora-like"]


def test_a_profile_makes_a_link_and_ends_its_faults() -> None:
    link = LinkModel(loss=0.5, duplicate=0.5, reorder=0.5)
    links.load("nb-iot").apply(link)
    assert (link.loss, link.duplicate, link.reorder) == (0.0, 0.0, 0.0)
    assert (link.up_bytes_per_s, link.down_bytes_per_s) == (3_900.0, 1_600.0)
    assert link.delay_s == pytest.approx(0.7)
    assert link.resend_s > 2 * link.delay_s


def test_a_users_own_file_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("delay_ms = 5\nup_bytes_per_s = 1000\n")
    assert links.load(str(file)) == links.LinkProfile(delay_ms=5.0, up_bytes_per_s=1_000.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("delay = 5", "link.delay is not a known key: did you mean delay_ms?"),
        ("colour = 'red'", "link.colour is not a known key: the keys are delay_ms, jitter_ms"),
        ("delay_ms = -1", "link.delay_ms must be milliseconds from 0 to 60000 (got -1"),
        ("delay_ms = 'long'", "link.delay_ms must be milliseconds"),
        ("jitter_ms = nan", "link.jitter_ms must be milliseconds"),
        ("up_bytes_per_s = 0", "link.up_bytes_per_s must be bytes per second from 1"),
        ("resent = 1.0", "link.resent must be a share from 0 to 0.9"),
        ("delay_ms = ", "must be a TOML file"),
    ],
)
def test_a_mistake_is_named_with_key_value_and_expectation(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        links.load(str(file))
    assert expected in str(raised.value)


@pytest.mark.parametrize(("wanted", "expected"), [("satelite", "did you mean 'satellite'"), ("none.toml", "readable")])
def test_an_unknown_profile_is_named(wanted: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        links.load(wanted)
