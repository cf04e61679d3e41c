"""A whole fleet on toy models over a real broker, in one process: what happens in the field is done to it."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

import numpy as np
import pytest
from msgspec.structs import replace

from cloud_verifier.service import CloudService
from cloud_verifier.wiring import LargeModel, cloud_of
from edge_agent.service import ModelFacts
from edge_agent.wiring import SmallModel, service_of
from edge_broker.embedded import EmbeddedBroker
from edge_broker.wiring import edge_of
from fedhlm.bus.mqtt import MqttBus
from fedhlm.client import Client
from fedhlm.config import load
from fedhlm.process.runtime import OpenBus, Runtime
from fedhlm.spans import PASSING, Tracer
from fedhlm.telemetry import Counters
from fedhlm_fleet.pki.acl import BrokerPlace
from fedhlm_lab.sim import toy
from tests.brokers import MOSQUITTO, Mosquitto
from tests.fedhlm_fleet.pki.secured import Pki, Secured

LIMIT_S = 60.0

NEEDS_MOSQUITTO = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
_OPEN = [pytest.param("mosquitto", marks=NEEDS_MOSQUITTO), "embedded"]
both_brokers = pytest.mark.parametrize("kind", _OPEN)
every_broker = pytest.mark.parametrize("kind", [*_OPEN, pytest.param("secured", marks=NEEDS_MOSQUITTO)])


class GuardedBroker:
    """A mosquitto with certificates and the rights that are made from the topic table, for the usual parties."""

    def __init__(self) -> None:
        self._pki = Pki()

    async def __aenter__(self) -> Self:
        self._pki.__enter__()
        self._pki.issue("porch", "agent", "home")
        self._pki.issue("edge-home", "edge", "home")
        self._pki.issue("cloud", "cloud")
        for name in ("client", "ann", "bob", "hog"):
            self._pki.issue(name, "client")
        self._pki.issue("broker", "broker")
        self._secured = await Secured(self._pki, BrokerPlace("shared")).__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._secured.__aexit__(None, None, None)
        self._pki.__exit__()

    def url_of(self, name: str) -> str:
        """The address with the certificate of a part ("agent home porch", "edge home", "cloud", "client ann")."""
        kind, *rest = name.split()
        return self._secured.url_of({"cloud": "cloud", "edge": "edge-home"}.get(kind) or rest[-1])


Broker = Mosquitto | EmbeddedBroker | GuardedBroker


def broker_of(kind: str, *, largest: int | None = None, stock: bool = False) -> Any:
    """A broker of that kind that takes no larger packets; with `stock`, as it is installed."""
    if kind == "secured":
        return GuardedBroker()
    if kind == "embedded":
        return EmbeddedBroker() if largest is None else EmbeddedBroker(max_packet_bytes=largest)
    return Mosquitto(
        extra=("" if stock else "set_tcp_nodelay true") + ("" if largest is None else f"\nmax_packet_size {largest}")
    )


class Fleet:
    """Parts of one installation on one broker; their buses and counters by name."""

    def __init__(self, broker: Broker, stack: AsyncExitStack, *, root: str, preset: str) -> None:
        self.buses: dict[str, list[MqttBus]] = {}
        self.counters: dict[str, Counters] = {}
        self.tracers: dict[str, Tracer] = {}  # by kind of part
        self.options: dict[str, Any] = {}  # of every connection
        self._broker, self._stack = broker, stack
        self._root, self._preset = root, preset
        self._pair = toy.pair(0.7)

    def bus(self, name: str, **options: Any) -> MqttBus:
        bus = MqttBus(self.url(name), **options, **self.options)
        self.buses.setdefault(name, []).append(bus)
        return bus

    def url(self, name: str) -> str:
        """The address of the broker for a part."""
        return self._broker.url_of(name) if isinstance(self._broker, GuardedBroker) else self._broker.url

    def _opener(self, name: str) -> OpenBus:
        def open_bus(*, client_id: str, birth: Any = None, will: Any = None, on_link: Any = None) -> MqttBus:
            return self.bus(name, client_id=client_id, birth=birth, will=will, on_link=on_link)

        return open_bus

    def _runtime(self, name: str) -> Runtime:
        self.counters[name] = Counters()
        return Runtime(self.counters[name], tracer=self.tracers.get(name.split(maxsplit=1)[0], PASSING))

    def _loaded(self, cluster: str = "home", agent: str = "porch", **flags: str) -> Any:
        keys = {"cluster.name": cluster, "agent.id": agent, "broker.root": self._root, "preset": self._preset}
        return load(environ={}, flags={**keys, **flags})

    async def _run(self, name: str, service: Any) -> None:
        await service.subscribe()
        for bus in self.buses[name]:
            await self._stack.enter_async_context(bus)
        task = asyncio.create_task(service.run(), name=name)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        self._stack.push_async_callback(end)

    async def cloud(self) -> CloudService:
        pair, name = self._pair, "cloud"
        model = LargeModel(pair.engine(), pair.fingerprint, pair.eos_ids, pair.context)
        service = cloud_of(self._loaded().config, self._runtime(name), model, open_bus=self._opener(name))
        await self._run(name, service)
        return service

    async def edge(self, cluster: str = "home", **flags: str) -> None:
        name = f"edge {cluster}"
        config = self._loaded(cluster, **flags).config
        await self._run(name, edge_of(config, self._runtime(name), open_down=self._opener(name)))

    async def agent(self, agent: str = "porch", cluster: str = "home", *, guest: str = "") -> Any:
        name = f"agent {cluster} {agent} {guest}"
        loaded = self._loaded(cluster, agent)
        config = replace(loaded.config, agent=replace(loaded.config.agent, id=agent))
        rng = random.Random(name)
        service = service_of(
            dataclasses.replace(loaded, config=config),
            self._runtime(name),
            SmallModel(self._pair.drafter(), self._pair.fingerprint, self._pair.space),
            ModelFacts(toy.ToyTokenizer(), None, frozenset({toy.EOS_ID}), toy.CONTEXT),
            open_bus=self._opener(name),
            new_session=lambda: rng.getrandbits(63),
            rng=np.random.default_rng(1),
            guest=guest,
        )
        await self._run(name, service)
        return service

    async def client(self, name: str = "client") -> Client:
        bus = self.bus(f"client {name}", client_id=f"{name}-{len(self.buses)}-{self._root}")
        return await self._stack.enter_async_context(Client(bus, name=name, root=self._root))

    async def whole(self, *agents: str) -> Client:
        """Edge, cloud and agents in the cluster home, and a client that has had an answer."""
        await self.edge()
        await self.cloud()
        for agent in agents or ("porch",):
            await self.agent(agent)
        return await self.client()

    @property
    def reconnects(self) -> dict[str, int]:
        """Connections that were lost and made again, by the parts that lost any."""
        found = {name: sum(bus.statistics.reconnects for bus in buses) for name, buses in self.buses.items()}
        return {name: count for name, count in found.items() if count}


@asynccontextmanager
async def fleets(
    kind: str, *roots: str, largest: int | None = None, preset: str = "exact", stock: bool = False
) -> AsyncIterator[list[Fleet]]:
    """An installation for each root, all on one broker; everything is stopped at the end."""
    async with (
        asyncio.timeout(LIMIT_S),
        broker_of(kind, largest=largest, stock=stock) as broker,
        AsyncExitStack() as stack,
    ):
        yield [Fleet(broker, stack, root=root, preset=preset) for root in roots or ("fedhlm/1",)]
