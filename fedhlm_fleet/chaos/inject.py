"""Injects faults into the running fleet and undoes them; tells the observer which messages may be lost meanwhile."""

import asyncio
import signal
import time
from collections.abc import Mapping
from itertools import count
from typing import Final

from fedhlm.protocol.roles import EDGE_PREFIX, ROLES, RoleTraits
from fedhlm_fleet.chaos.observer import Observer
from fedhlm_fleet.chaos.parts import BROKER, BrokerPart, Parts
from fedhlm_fleet.chaos.proxy import Proxy
from fedhlm_fleet.chaos.schedule import Fault
from fedhlm_lab.sim.liars import LIES

LIE_EVERY_S: Final = 0.5


class Injector:
    """Injects faults. By part name, `proxies` has the proxy between part and broker, and `role_of` the part's role."""

    def __init__(
        self,
        *,
        observer: Observer,
        parts: Parts,
        broker: BrokerPart,
        proxies: Mapping[str, Proxy],
        role_of: Mapping[str, str],
    ) -> None:
        self._observer = observer
        self._parts = parts
        self._broker = broker
        self._proxies = proxies
        self._role_of = role_of

    def concerned(self, fault: Fault) -> set[str]:
        """Return the agents whose texts a fault may delay."""
        clusters = {name.removeprefix(EDGE_PREFIX) for name in fault.targets if self._traits(name).relays}
        everyone = BROKER in fault.targets or any(self._traits(name).verifies for name in fault.targets)
        return {p.agent for p in self._observer.places if everyone or p.agent in fault.targets or p.cluster in clusters}

    def _traits(self, name: str) -> RoleTraits:
        return RoleTraits() if name == BROKER else ROLES[self._role_of[name]]

    async def inject(self, fault: Fault) -> None:
        """Inject a fault, wait until its time is over, and undo it."""
        # A fault of an edge or of the cloud excuses no lost answer: the device must go on alone.
        lossy = {p.agent for p in self._observer.places if BROKER in fault.targets or p.agent in fault.targets}
        if fault.kind not in ("throttle", "delay", "lie"):
            self._observer.disturbances.begin(lossy, time.monotonic())
        match fault.kind:
            case "kill":
                await self._kill(fault)
            case "freeze":
                await self._freeze(fault)
            case "lie":
                await self._lie(fault)
            case _:
                await self._trouble(fault)
        self._observer.disturbances.heal(lossy, time.monotonic())

    async def _kill(self, fault: Fault) -> None:
        for name in fault.targets:
            await self._parts.kill(name)
            if name == BROKER:
                self._observer.broker_died()
            elif self._traits(name).drafts:
                self._observer.agent_died(name)
        await asyncio.sleep(fault.hold_s)
        for name in fault.targets:
            if name == BROKER:
                await self._broker.restart(keep=fault.keep)
                self._observer.broker_is_back()
            else:
                await self._parts.start(name)

    async def _freeze(self, fault: Fault) -> None:
        for name in fault.targets:
            self._parts.signal(name, signal.SIGSTOP)
        await asyncio.sleep(fault.hold_s)
        for name in fault.targets:
            self._parts.signal(name, signal.SIGCONT)

    async def _lie(self, fault: Fault) -> None:
        """Contribute lies to the federation in the name of the agent, after each of its honest contributions too."""
        name, until_s = list(LIES)[int(fault.amount) - 1], time.monotonic() + fault.hold_s
        for number in count(1):
            for agent in fault.targets:
                await self._observer.lie(agent, name, number)
            await asyncio.sleep(LIE_EVERY_S)
            if time.monotonic() >= until_s:
                return

    async def _trouble(self, fault: Fault) -> None:
        proxies = [self._proxies[name] for name in fault.targets]
        for proxy in proxies:
            match fault.kind:
                case "cut":
                    proxy.cut(refuse=True)
                case "stall":
                    proxy.stall()
                case "throttle":
                    proxy.throttle(int(fault.amount))
                case "delay":
                    proxy.delay(fault.amount)
                case "half-open-near":
                    proxy.half_open("near")
                case "half-open-far":
                    proxy.half_open("far")
        await asyncio.sleep(fault.hold_s)
        for proxy in proxies:
            proxy.heal()
