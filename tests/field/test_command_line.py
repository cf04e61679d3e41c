"""What is typed: prompts that look like options, passwords with signs in an address, numbers out of range, no broker."""

import time
from typing import Any
from urllib.parse import quote

import pytest

import fedhlm
from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.bus.mqtt import MqttBus
from fedhlm.errors import ConfigError
from fedhlm.settings import Broker
from tests.brokers import Mosquitto
from tests.field.fleet import both_brokers
from tests.processes import one_line, run

NOBODY = "mqtt://127.0.0.1:1"

PASSWORDS = (
    "a#b",
    "a/b",
    "a?b",
    "a@b",
    "a:b",
    "a%b",
    "a%40b",
    "a[b]",
    "a b",
    "a\\b",
    "a+b&c=d",
    "pässwörd ☕",
    "'\"$`",
)
ENDING = ("a#b", "a/b", "a?b", "a[b]")


def broker_with(kind: str, users: dict[str, str]) -> Any:
    return Mosquitto(users=users) if kind == "mosquitto" else EmbeddedBroker(users=users)


@both_brokers
async def test_a_password_opens_the_broker_whatever_signs_it_has(kind: str) -> None:
    users = {f"u{n}": password for n, password in enumerate(PASSWORDS)} | {"me@home": "x#y"}
    async with broker_with(kind, users) as broker:
        for name, password in users.items():
            encoded = f"{quote(name, safe='')}:{quote(password, safe='')}@"
            async with MqttBus(
                broker.url.replace("mqtt://", f"mqtt://{encoded}"), client_id="x", connect_timeout_s=5.0
            ) as bus:
                assert bus.connected, password
            async with fedhlm.Client(Broker(url=broker.url, username=name, password=password)) as client:
                assert client.party.bus.connected, password
        with pytest.raises(fedhlm.FedhlmError, match="refused: (bad user name or password|not authorised)") as caught:
            async with MqttBus(broker.url.replace("mqtt://", "mqtt://u0:a%23c@"), client_id="x", connect_timeout_s=5.0):
                pass
        assert "a#c" not in str(caught.value)


@pytest.mark.parametrize("password", ENDING)
def test_a_password_that_ends_the_address_is_to_be_encoded_and_is_not_shown(password: str) -> None:
    with pytest.raises(ConfigError, match="percent-encoded") as caught:
        BrokerUrl.parse(f"mqtt://me:{password}@broker.example")
    assert password not in str(caught.value)
    done = run("ask", "porch", "Oil", FEDHLM_BROKER__URL=f"mqtt://me:{password}@broker.example")
    assert password not in one_line(done, 2)


@pytest.mark.parametrize(
    ("option", "given"), [("--seed", str(2**64)), ("--seed", "-1"), ("--tokens", "70000"), ("--duration", "0")]
)
def test_a_number_out_of_range_is_refused_at_once(option: str, given: str) -> None:
    begun_s = time.monotonic()
    assert option in one_line(run("demo", option, given), 2)
    assert time.monotonic() - begun_s < 30.0


@pytest.mark.parametrize("prompt", ["- Oil prices rise", "-", "--seed", "\ufeffOil\nb"])
def test_a_device_that_writes_alone_needs_no_broker(prompt: str) -> None:
    done = run(
        "agent", "--preset", "slm-only", "--broker.url", NOBODY, "--generation.max_tokens", "4", f"--prompt={prompt}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "uplink_bytes 0;" in done.stderr
    assert "WARNING" not in done.stderr


def test_a_prompt_may_begin_with_a_hyphen_as_a_word_of_its_own() -> None:
    done = run("agent", "--preset", "slm-only", "--generation.max_tokens", "4", "--prompt", "- Oil prices rise")
    assert done.returncode == 0, done.stderr


def test_all_others_need_one_and_say_which() -> None:
    done = run("agent", "--preset", "exact", "--broker.url", NOBODY, "--broker.connect_timeout_s", "1", "--prompt", "x")
    assert "127.0.0.1:1" in one_line(done, 2)
