"""Orders from flags and CSV: what is wrong is told by line before any card is touched; one failure stops no other card."""

import lzma
from pathlib import Path

import pytest

from fedhlm.errors import ConfigError
from fedhlm_fleet.flash import batch, bundle, plan
from fedhlm_fleet.flash.batch import Order
from fedhlm_fleet.flash.plan import FlashError, PlannedFile
from tests.fedhlm_fleet.flash import cards

BASE = {"agent": "porch", "cluster": "home", "broker": "mqtt://edge", "image": "base.img"}


def payload_of(order: Order) -> plan.Payload:
    parts = [PlannedFile("wheels/a.whl", b"a" * 5_000)]
    units = bundle.shipped_units()
    return plan.payload(order.device, tls=None, settings=order.party.settings, bundle=parts, units=units, made_s=1)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"agent": ""}, "--agent"),
        ({"cluster": ""}, "--cluster"),
        ({"broker": ""}, "--broker"),
        ({"image": ""}, "--image, --boot, --device"),
        ({"boot": "b"}, "--image, --boot, --device"),
        ({"image": "", "device": "/dev/sdx", "out": "o"}, "--image, --boot, --device"),
        ({"wifi_country": "DE"}, "--wifi-ssid"),
        ({"wifi_ssid": "net"}, "--wifi-country"),
        ({"cert": "a.crt"}, "--cert, --key, --ca"),
        ({"ssh_key": "nowhere.pub"}, "--ssh-key"),
        ({"config": "nowhere.toml"}, "--config"),
    ],
)
def test_an_order_that_cannot_be_is_refused_by_its_flag(change: dict[str, str], flag: str) -> None:
    with pytest.raises((ConfigError, FlashError), match=flag):
        batch.order_of({**BASE, **change})


def test_a_private_key_never_goes_onto_a_card(tmp_path: Path) -> None:
    key = tmp_path / "id"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n")
    with pytest.raises(ConfigError, match="must be the public key"):
        batch.order_of({**BASE, "ssh_key": str(key)})


def test_a_configuration_that_the_agent_would_refuse_is_refused_here(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    for text, key in (("[agent]\nthread = 1\n", "agent.thread"), ('preset = "mine.toml"\n', "preset|mine.toml")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=key):
            batch.order_of({**BASE, "config": str(file)})


def test_a_csv_file_takes_empty_cells_from_the_flags(tmp_path: Path) -> None:
    (tmp_path / "barn.pw").write_text("barn password\n")
    (tmp_path / "home.pw").write_text("home password\n")
    file = tmp_path / "cards.csv"
    file.write_text(
        "agent, cluster, wifi_ssid, wifi_password_file, out\n"
        "porch,,,,\n"
        f"cow, barn, Barn Net, {tmp_path}/barn.pw,\n"
        f'"roof",,"",,{tmp_path}/special.img\n'
    )
    flags = {"cluster": "home", "broker": "mqtt://edge", "image": "base.img", "out": str(tmp_path), "wifi_ssid": "Home"}
    orders = batch.read(file, {**flags, "wifi_password_file": str(tmp_path / "home.pw"), "wifi_country": "DE"})
    assert [(o.device.agent, o.device.cluster, str(o.out)) for o in orders] == [
        ("porch", "home", f"{tmp_path}/porch.img"),
        ("cow", "barn", f"{tmp_path}/cow.img"),
        ("roof", "home", f"{tmp_path}/special.img"),
    ]
    keys = [order.device.wifi.password for order in orders if order.device.wifi is not None]
    assert len(keys) == 3
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1 of "),
        ("agent,colour\na,red\n", "columns in line 1 of .*got 'colour'"),
        ("agent\n", "no line below"),
        ("agent,hostname\na,b,c\n", "line 2 must be 2 cells"),
        ("agent,hostname\na\n", "line 2 must be 2 cells"),
        ("agent\na\n\nb!\n", "line 4: --agent must be "),
        ("agent\na\nb\na\n", "line 4: agent 'a' is that of line 2"),
        ("agent,out\na,x.img\nb,x.img\n", "line 3: target 'x.img' is that of line 2"),
        ("agent,hostname\nb!,\nc,-x\n", "line 2: .*; line 3: --hostname"),
    ],
)
def test_a_bad_line_is_told_by_its_number(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "cards.csv"
    file.write_text(text)
    with pytest.raises(FlashError, match=said):
        batch.read(file, {"cluster": "home", "broker": "mqtt://edge", "image": "base.img", "out": f"{tmp_path}"})


def test_many_cards_are_made_from_one_image_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    base = cards.make(tmp_path / "base.img")
    before = base.read_bytes()
    values = {**BASE, "image": str(base)}
    orders = [
        batch.order_of({**values, "agent": name, "out": f"{tmp_path}/out/{name}.img"}) for name in ("a", "b", "c")
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b.img.new").mkdir()
    said: list[str] = []
    done, failed = batch.make_all(orders, payload_of, said.append)
    assert [made.order.device.agent for made in done] == ["a", "c"]
    assert failed == 1
    assert [line.split(":")[0] for line in said] == ["[1/3] a", "[2/3] b", "[3/3] c"]
    assert "FAILED, cannot write" in said[1]
    assert base.read_bytes() == before
    for name in ("a", "c"):
        image = tmp_path / f"out/{name}.img"
        assert f'id = "{name}"' in cards.read(image, "fedhlm/agent.toml")
        assert f'local-hostname: "{name}"' in cards.read(image, "meta-data")
        assert image.stat().st_mode & 0o077 == 0


def test_flashing_again_leaves_the_same_card(tmp_path: Path) -> None:
    image = cards.make(tmp_path / "sd.img")
    order = batch.order_of({**BASE, "image": str(image)})
    contents = []
    for _ in range(2):
        batch.make(order, payload_of(order), lambda _: None)
        contents.append({name: cards.read(image, name) for name in cards.names(image)})
    assert contents[0] == contents[1]


def test_a_compressed_image_is_unpacked_on_the_way_and_a_cut_one_leaves_nothing(tmp_path: Path) -> None:
    raw = cards.make(tmp_path / "sd.img").read_bytes()
    packed = tmp_path / "os.img.xz"
    packed.write_bytes(lzma.compress(raw, preset=0))
    order = batch.order_of({**BASE, "image": str(packed), "out": f"{tmp_path}/card.img"})
    batch.make(order, payload_of(order), lambda _: None)
    assert "fedhlm/install.sh" in cards.names(tmp_path / "card.img")
    packed.write_bytes(packed.read_bytes()[:-40])
    again = batch.order_of({**BASE, "image": str(packed), "out": f"{tmp_path}/again.img"})
    with pytest.raises(FlashError, match="cannot copy"):
        batch.make(again, payload_of(again), lambda _: None)
    assert not list(tmp_path.glob("*again*"))


def test_a_device_that_is_none_is_never_opened(tmp_path: Path) -> None:
    victim = tmp_path / "sdx"
    victim.write_bytes(b"precious")
    order = batch.order_of({**BASE, "image": "", "device": str(victim)})
    with pytest.raises(FlashError, match="a disk such as"):
        batch.make(order, payload_of(order), lambda _: None)
    assert victim.read_bytes() == b"precious"
