"""A liar under certificates and rights, on mosquitto: revoked, forgotten everywhere, and no restart brings it back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from cloud_verifier.engine import Engine
from cloud_verifier.wiring import LargeModel, cloud_of
from edge_broker.__main__ import run as run_edge
from fedhlm.bus.mqtt import MqttBus
from fedhlm.bus.party import Party, Stamp
from fedhlm.config import load
from fedhlm.learning.curve import Curve
from fedhlm.learning.learnt_state import State
from fedhlm.process.notify import Notifier
from fedhlm.process.run import opener
from fedhlm.process.runtime import Runtime
from fedhlm.process.state import store_of
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Contribution, Forget, Learned
from fedhlm.telemetry import Counters
from fedhlm_fleet.cli import main
from fedhlm_fleet.pki.acl import BrokerPlace
from fedhlm_lab.sim import toy
from tests.brokers import MOSQUITTO, until
from tests.fedhlm_fleet.pki.secured import Pki, Secured

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
LIMIT_S = 120.0
TRUTH, LIE = 40.0, 150.0


def packed(tokens: float, harm: float) -> dict[str, bytes]:
    made = Curve.empty()
    made.add(0.3, harm, tokens)
    return {"u": made.to_bytes()}


class Fleet:
    """Two edges and a cloud with a toy model, each with a folder for its state, and what an observer hears."""

    def __init__(self, broker: Secured, folder: Path) -> None:
        self.broker, self.folder = broker, folder
        self.tasks: dict[str, asyncio.Task[object]] = {}
        self.states: dict[str, State] = {}

    def start(self, name: str) -> None:
        flags = {
            "broker.url": self.broker.host,
            **self.broker.pki.keys(name),
            "cluster.name": name.removeprefix("edge-"),
            "edge.state": str(self.folder / name),
            "cloud.state": str(self.folder / name),
            "federation.round_s": "0.2",
        }
        config = load(environ={}, flags={key: str(value) for key, value in flags.items()}).config
        work = run_edge(config, Counters()) if name != "cloud" else self._cloud(config)
        self.tasks[name] = asyncio.create_task(work, name=name)

    async def _cloud(self, config) -> None:  # type: ignore[no-untyped-def]
        model = LargeModel(
            Engine(toy.ToyCache(), toy.large_forward), toy.FINGERPRINT, frozenset({toy.EOS_ID}), toy.CONTEXT
        )
        store = store_of(config.cloud.state, key="cloud.state")
        runtime = Runtime.of_process(Counters(), store=store, journal=False)
        service = cloud_of(config, runtime, model, open_bus=opener(config.broker, Notifier(), "the broker"))
        await service.subscribe()
        async with service.bus:
            await service.run()

    async def stop(self, *names: str) -> None:
        for name in names:
            task = self.tasks.pop(name)
            task.cancel()
            await asyncio.wait([task])

    async def watch(self, bus: MqttBus) -> None:
        party = Party(bus=bus, stamp=Stamp("eye"), counters=Counters())
        async for received in party.received():
            if isinstance(received.message, Learned):
                self.states[received.levels.get("cluster", "cloud")] = State.of(received.message)

    def sums(self, where: str) -> tuple[float, float]:
        state = self.states.get(where)
        curve = None if state is None else state.curves.get("u")
        return (0.0, 0.0) if curve is None else (curve.total_weight, float(curve.harm.sum()))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            await until(holds)


@asynccontextmanager
async def fleet(folder: Path) -> AsyncIterator[Fleet]:
    with Pki() as pki:
        for name, role, *clusters in (
            ("edge-home", "edge"),
            ("edge-barn", "edge"),
            ("cloud", "cloud"),
            ("liar", "agent", "home"),
            ("porch", "agent", "home"),
            ("chief", "operator"),
            ("eye", "observer"),
            ("broker", "broker"),
        ):
            pki.issue(name, role, *clusters)  # type: ignore[arg-type]
        async with AsyncExitStack() as stack:
            broker = await stack.enter_async_context(Secured(pki, BrokerPlace("shared")))
            made = Fleet(broker, folder)
            eye = await stack.enter_async_context(broker.bus("eye"))
            await eye.subscribe(topics.FL_STATE.name(cluster="+"), topics.CLOUD_FL_STATE.name())
            made.tasks["eye"] = asyncio.create_task(made.watch(eye))
            for name in ("cloud", "edge-home", "edge-barn"):
                made.start(name)
            try:
                yield made
            finally:
                await made.stop(*list(made.tasks))


async def contribute(bus: MqttBus, name: str, tokens: float, harm: float, number: int) -> None:
    party = Party(bus=bus, stamp=Stamp(name), counters=Counters())
    message = Contribution(**party.stamp(), round=number, members=1, curves=packed(tokens, harm))
    await party.send(topics.FL_UPDATE, message, cluster="home", agent=name)


async def test_a_revoked_liar_is_forgotten_everywhere_and_stays_so_through_restarts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with fleet(tmp_path) as found, AsyncExitStack() as stack:
        broker = found.broker
        liar, porch = [await stack.enter_async_context(broker.bus(name)) for name in ("liar", "porch")]
        for _ in range(3):  # an edge that is just starting may not hear the first one
            await contribute(liar, "liar", LIE, 0.0, 1)
            await contribute(porch, "porch", TRUTH, 0.5, 1)
            await asyncio.sleep(0.5)
        both = pytest.approx((TRUTH + LIE, TRUTH / 2))
        await found.until(lambda: found.sums("home") == both and found.sums("barn") == both)
        # Not even an agent that holds a certificate may give orders.
        dropped = porch.statistics.dropped_out
        await Party(bus=porch, stamp=Stamp("porch"), counters=Counters()).send(
            topics.FORGET, Forget(**Stamp("porch")(), order=1), member="liar"
        )
        await porch.wait_backlog(0)
        assert porch.statistics.dropped_out == dropped + 1
        operator = [word for key, path in broker.pki.keys("chief").items() for word in (f"--{key}", str(path))]
        words = ["pki", "revoke", "liar", "--pki", str(broker.pki.folder), "--broker", broker.host, *operator]
        capsys.readouterr()
        assert await asyncio.to_thread(main, words) == 0
        assert "forgot liar at the cloud and at every edge" in capsys.readouterr().out
        broker.write()
        await broker.reload()
        honest = pytest.approx((TRUTH, TRUTH / 2))
        await found.until(lambda: all(found.sums(where) == honest for where in ("home", "cloud", "barn")))
        for names in (("cloud",), ("edge-home",), ("edge-barn",), ("cloud", "edge-home", "edge-barn")):
            await found.stop(*names)
            found.states.clear()
            for name in names:
                found.start(name)
            await contribute(liar, "liar", LIE, 0.0, 2)  # its connection is open, without any right
            # What is republished or retained since the restart.
            await found.until(lambda: bool(found.states))
            await asyncio.sleep(1.0)
            assert all(found.sums(where) == honest for where in found.states), found.states
        assert await asyncio.to_thread(
            main, ["federation", "list", "--json", "--broker", broker.host, *operator]
        ) == 0  # fmt: skip
        assert '"liar"' not in capsys.readouterr().out
