"""Each step towards a broker, made to fail on real brokers: mosquitto with certificates and rights, and the embedded one."""

import asyncio
import datetime as dt
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.mqtt import MqttBus
from fedhlm.config import load
from fedhlm.protocol import topics
from fedhlm.protocol.roles import PartRole
from fedhlm_fleet.doctor import broker
from fedhlm_fleet.doctor.checks import checks_of
from fedhlm_fleet.doctor.finding import Finding, Subject
from fedhlm_fleet.doctor.runner import examine
from tests.brokers import MOSQUITTO, Mosquitto, free_port

TLS = "cafile {0}/ca.pem\ncertfile {0}/server.pem\nkeyfile {0}/server.key\nrequire_certificate true\n"
NAMES = {"agent": "porch", "edge": "edge-home", "cloud": "cloud"}
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def subject(
    url: str, role: PartRole = "agent", *, environ: dict[str, str] | None = None, flags: dict[str, str] | None = None
) -> Subject:
    given = {"broker.url": url, "agent.id": "porch", **(flags or {})}
    return Subject(role, load(environ=environ or {}, flags=given))


async def steps(examined: Subject, only: str = "broker ") -> dict[str, Finding]:
    """The findings of the steps whose names begin so."""

    def run() -> dict[str, Finding]:
        checks = [c for c in checks_of(examined) if c.name.startswith(only) or c.name == "configuration"]
        try:
            return {f.name: f for f in examine(checks, examined)}
        finally:
            examined.close()

    return await asyncio.to_thread(run)


def acl(role: PartRole) -> str:
    """The rights of one party from the topic table, as mosquitto reads them."""
    lines = [f"user {NAMES[role]}"]
    for topic in topics.TABLE:
        agent = "porch" if role == "agent" else "+"
        cluster = "+" if role == "cloud" else "home"
        if role in topic.publishers:
            lines.append(f"topic write {topic.filter(cluster=cluster, agent=agent)}")
        if role in topic.subscribers:
            everybody = topic in (topics.PEER, topics.NEIGHBOUR)
            read = topic.filter(cluster="+" if everybody else cluster, agent="+" if everybody else agent)
            lines.append(f"topic read {read}")
    return "\n".join(lines)


class Secured(NamedTuple):
    broker: Mosquitto
    authority: trustme.CA

    @property
    def url(self) -> str:
        return f"mqtts://localhost:{self.broker.port}"

    def client(self, folder: Path, name: str, days: int = 365) -> dict[str, str]:
        """Flags with a fresh certificate of that name."""
        ends = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
        issued = self.authority.issue_cert(common_name=name, not_after=ends)
        files = {"ca": folder / "ca.crt", "cert": folder / "me.crt", "key": folder / "me.key"}
        self.authority.cert_pem.write_to_path(str(files["ca"]))
        issued.cert_chain_pems[0].write_to_path(str(files["cert"]))
        issued.private_key_pem.write_to_path(str(files["key"]))
        return {f"broker.{key}": str(path) for key, path in files.items()}


@asynccontextmanager
async def secured(extra: str = "", rights: str | None = None) -> AsyncIterator[Secured]:
    authority = trustme.CA()
    server = authority.issue_cert("localhost")
    files = {
        "ca.pem": authority.cert_pem.bytes(),
        "server.pem": server.cert_chain_pems[0].bytes(),
        "server.key": server.private_key_pem.bytes(),
    }
    if rights is not None:
        files["acl"] = rights.encode()
        extra += "use_identity_as_username true\nacl_file {0}/acl\n"
    async with Mosquitto(extra=f"set_tcp_nodelay true\n{TLS}{extra}", files=files) as mosquitto:
        yield Secured(mosquitto, authority)


async def test_a_name_that_nobody_knows() -> None:
    found = await steps(subject("mqtt://no-such-host.invalid"))
    assert found["broker host"].level == "fail"
    assert "no-such-host.invalid" in found["broker host"].found
    assert found["broker login"].level == "skip"


async def test_a_port_that_nobody_listens_on() -> None:
    found = await steps(subject(f"mqtt://127.0.0.1:{free_port()}"))
    assert found["broker host"].level == "ok"
    assert found["broker port"].level == "fail"
    assert "nobody listens" in found["broker port"].found
    assert "mosquitto" in found["broker port"].advice
    assert found["broker rights"].level == "skip"


async def test_a_port_whose_program_says_nothing_does_not_hang_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "STEP_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = await steps(subject(f"mqtt://127.0.0.1:{server.getsockname()[1]}"))
        assert found["broker port"].level == "ok"
        assert found["broker login"].level == "fail"
        assert found["broker login"].seconds < 5.0


async def test_an_edge_s_own_broker_that_is_not_running_is_no_failure() -> None:
    port = str(free_port())
    examined = Subject("edge", load(environ={}, flags={"edge.embedded_port": port}))
    found = await steps(examined)
    assert found["broker port"].level == "skip"
    assert "own broker" in found["broker port"].found


async def test_a_broker_of_mqtt_3_is_examined_as_far_as_it_tells() -> None:
    async with EmbeddedBroker(versions=(4,)) as running:
        found = await steps(subject(running.url))
    assert found["broker login"].level == "ok"
    assert "MQTT 3.1.1" in found["broker login"].found
    assert found["broker rights"].level == "ok", found
    assert "comes back" in found["broker rights"].found


@needs_mosquitto
@pytest.mark.parametrize("role", ["agent", "edge", "cloud"])
async def test_a_broker_with_certificates_and_rights_is_in_order(role: PartRole, tmp_path: Path) -> None:
    async with secured(rights=acl(role)) as place:
        found = await steps(subject(place.url, role, flags=place.client(tmp_path, NAMES[role])))
    assert {f.level for f in found.values() if f.name != "configuration"} == {"ok"}, found
    assert "TLSv1.3" in found["broker TLS"].found
    assert NAMES[role] in found["broker own cert"].found
    assert "is refused" in found["broker rights"].found


@needs_mosquitto
async def test_a_broker_that_takes_us_for_another_refuses_what_is_ours(tmp_path: Path) -> None:
    async with secured(rights=acl("agent")) as place:
        found = await steps(subject(place.url, flags=place.client(tmp_path, "attic")))
    assert found["broker login"].level == "ok"
    assert found["broker rights"].level == "fail"
    assert "may not publish" in found["broker rights"].found
    assert "access rules" in found["broker rights"].advice


@needs_mosquitto
async def test_a_broker_without_rights_is_a_warning() -> None:
    async with Mosquitto() as running:
        found = await steps(subject(running.url))
    assert found["broker TLS"].level == "ok"  # on this machine nobody listens in
    assert found["broker rights"].level == "warn"
    assert "under another's name" in found["broker rights"].found


@needs_mosquitto
async def test_another_authority_s_certificate_is_refused(tmp_path: Path) -> None:
    async with secured() as place:
        flags = place.client(tmp_path, "porch")
        trustme.CA().cert_pem.write_to_path(flags["broker.ca"])
        found = await steps(subject(place.url, flags=flags))
    assert found["broker TLS"].level == "fail"
    assert "broker.ca" in found["broker TLS"].advice
    assert found["broker own cert"].level == "fail"
    assert found["broker login"].level == "skip"


@needs_mosquitto
async def test_a_name_that_is_not_in_the_certificate_is_refused(tmp_path: Path) -> None:
    async with secured() as place:
        url = place.url.replace("localhost", "127.0.0.1")
        found = await steps(subject(url, flags=place.client(tmp_path, "porch")))
    assert found["broker TLS"].level == "fail"
    assert "--dns 127.0.0.1" in found["broker TLS"].advice


@needs_mosquitto
async def test_without_a_certificate_a_broker_that_wants_one_is_understood(tmp_path: Path) -> None:
    async with secured() as place:
        flags = place.client(tmp_path, "porch")
        found = await steps(subject(place.url, flags={"broker.ca": flags["broker.ca"]}))
    assert found["broker TLS"].level == "fail", found
    assert "broker.cert" in found["broker TLS"].advice


@needs_mosquitto
async def test_our_certificate_that_is_about_to_end_is_a_warning_and_an_expired_one_fails(tmp_path: Path) -> None:
    async with secured() as place:
        soon = await steps(subject(place.url, flags=place.client(tmp_path, "porch", days=10)))
        late = await steps(subject(place.url, flags=place.client(tmp_path, "porch", days=-1)))
    assert soon["broker own cert"].level == "warn"
    assert "(9 days)" in soon["broker own cert"].found
    assert late["broker own cert"].level == "fail"
    assert "expired" in late["broker own cert"].found
    assert late["broker TLS"].level == "fail"


@needs_mosquitto
async def test_mqtt_without_tls_on_a_port_with_tls_fails_in_words(tmp_path: Path) -> None:
    async with secured() as place:
        found = await steps(subject(place.url.replace("mqtts", "mqtt")))
    assert found["broker login"].level == "fail"
    async with Mosquitto() as running:
        found = await steps(subject(running.url.replace("mqtt://", "mqtts://")))
    assert found["broker TLS"].level == "fail"
    assert "TLS" in found["broker TLS"].advice


@needs_mosquitto
async def test_a_wrong_password_is_named_and_not_shown() -> None:
    async with Mosquitto(users={"porch": "right"}) as running:
        environ = {"FEDHLM_BROKER__USERNAME": "porch", "FEDHLM_BROKER__PASSWORD": "wrong-secret"}
        found = await steps(subject(running.url, environ=environ))
        environ["FEDHLM_BROKER__PASSWORD"] = "right"
        good = await steps(subject(running.url, environ=environ))
    assert found["broker login"].level == "fail"
    assert "password" in found["broker login"].advice
    assert "wrong-secret" not in str(found)
    assert good["broker login"].level == "ok"


@needs_mosquitto
async def test_a_running_part_goes_on_undisturbed() -> None:
    links: list[bool] = []
    async with (
        Mosquitto() as running,
        MqttBus(running.url, client_id="home-porch", on_link=links.append, connect_timeout_s=10.0) as bus,
    ):
        await bus.subscribe("fedhlm/1/c/home/a/porch/status")
        found = await steps(subject(running.url))
        assert found["broker rights"].level == "warn"
        assert bus.connected
        assert links == [True]
        assert bus.statistics.messages_in == 0


@needs_mosquitto
async def test_where_a_name_has_one_connection_the_running_part_keeps_it() -> None:
    """Such a broker makes the client id from the user's name: the part comes back, and the doctor says why it left."""
    users = {"porch": "secret"}
    async with Mosquitto(users=users, extra="use_username_as_clientid true") as running:
        url = running.url.replace("mqtt://", "mqtt://porch:secret@")
        examined = subject(
            running.url, environ={"FEDHLM_BROKER__USERNAME": "porch", "FEDHLM_BROKER__PASSWORD": "secret"}
        )
        said = await asyncio.to_thread(broker.login, examined, "broker")
        assert said.level == "ok"
        async with MqttBus(url, client_id="home-porch", connect_timeout_s=10.0):
            said = await asyncio.to_thread(broker.rights, examined, "broker")
        examined.close()
    assert said.level == "skip"
    assert "each certificate one connection" in said.found


@needs_mosquitto
async def test_an_edge_s_two_brokers_are_examined_each_for_itself() -> None:
    async with Mosquitto() as home, Mosquitto() as away:
        examined = subject(home.url, "edge", flags={"edge.upstream.url": away.url})
        both = await steps(examined, only="")
        dead = subject(home.url, "edge", flags={"edge.upstream.url": f"mqtt://127.0.0.1:{free_port()}"})
        one = await steps(dead, only="")
    assert both["broker rights"].level == both["edge.upstream rights"].level == "warn"
    assert "comes back" in both["edge.upstream rights"].found
    assert "comes back" not in both["broker rights"].found
    assert both["cloud"].level == "fail"
    assert one["broker rights"].level == "warn"
    assert one["edge.upstream port"].level == "fail"
    assert one["cloud"].level == "skip"


@needs_mosquitto
@pytest.mark.parametrize(("line", "level"), [("", "warn"), ("set_tcp_nodelay true", "ok")])
async def test_a_broker_that_holds_small_packets_back_is_seen(line: str, level: str) -> None:
    async with Mosquitto(extra=line) as running:
        found = await steps(subject(running.url))
    assert found["broker delay"].level == level, found["broker delay"]
    assert ("set_tcp_nodelay true" in found["broker delay"].advice) == (level == "warn")
