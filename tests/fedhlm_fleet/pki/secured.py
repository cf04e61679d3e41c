"""A PKI in a temporary folder and real mosquitto brokers that trust it, for tests."""

import asyncio
import os
import signal
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from fedhlm.bus.mqtt import MqttBus
from fedhlm_fleet.pki import authority
from fedhlm_fleet.pki.acl import BrokerPlace
from fedhlm_fleet.pki.mosquitto import Listener, configure
from fedhlm_fleet.pki.roles import CertificateRole
from tests.brokers import START_TIMEOUT_S, Mosquitto, until


def now() -> datetime:
    return datetime.now(UTC)


LONG_AGO = now() - timedelta(days=30)


class Pki:
    """A CA in a folder of its own; parties are issued by `role` and cluster."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="pki-")
        self.folder = Path(self._temporary.name) / "pki"

    def __enter__(self) -> Self:
        authority.create(self.folder, now=LONG_AGO)
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def issue(
        self, name: str, role: CertificateRole, *clusters: str, at: datetime | None = None, days: int = 365
    ) -> None:
        hosts = ("localhost", "127.0.0.1") if role == "broker" else ()
        authority.issue(self.folder, name, role=role, clusters=clusters, hosts=hosts, days=days, now=at or now())

    def keys(self, name: str, prefix: str = "broker") -> dict[str, object]:
        """Configuration keys of a party."""
        home = self.folder / "issued" / name
        files = {"ca": home / "ca.crt", "cert": home / f"{name}.crt", "key": home / f"{name}.key"}
        return {f"{prefix}.{key}": str(path) for key, path in files.items()}


class Secured(Mosquitto):
    """A mosquitto with the configuration that `configure` makes; entered, it runs."""

    def __init__(self, pki: Pki, place: BrokerPlace, *, extra: str = "") -> None:
        super().__init__(extra=extra)
        self.pki, self.place = pki, place

    @property
    def host(self) -> str:
        return f"mqtts://localhost:{self.port}"

    def write(self) -> None:
        """Write the configuration; a running broker reads it at its next start or `reload`."""
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        listener = Listener(self.port, "127.0.0.1", "", str(data))
        configure(self.pki.folder, self.folder, place=self.place, listener=listener, now=now())
        # Root's mosquitto would become another user, who cannot read this folder.
        user = "user root\n" if os.geteuid() == 0 else ""
        with (self.folder / "mosquitto.conf").open("a") as file:
            file.write(f"{user}{self._extra}")

    async def reload(self) -> None:
        """SIGHUP, and wait until the broker says that it has begun; it finishes before it serves anybody."""
        assert self._process is not None
        before = self.log.count("Reloading config")
        self._process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(START_TIMEOUT_S):
            await until(lambda: self.log.count("Reloading config") > before)

    def url_of(self, name: str, *, pki: Pki | None = None) -> str:
        """The address as `name`, with its own certificate and this broker's CA."""
        theirs = (pki or self.pki).keys(name)
        return f"{self.host}?ca={self.pki.folder / 'ca.crt'}&cert={theirs['broker.cert']}&key={theirs['broker.key']}"

    def bus(self, name: str, *, pki: Pki | None = None, **options: Any) -> MqttBus:
        settings: dict[str, Any] = {"client_id": name, "connect_timeout_s": 10.0, "backoff_cap_s": 0.1}
        return MqttBus(self.url_of(name, pki=pki), **(settings | options))
