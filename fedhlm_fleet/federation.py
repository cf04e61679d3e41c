"""The members of a fleet's federation, as its edges and its cloud list them, and orders to forget one of them."""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Final, Self

import msgspec

from fedhlm import settings
from fedhlm.bus.party import Party, Stamp
from fedhlm.errors import ConfigError, FedhlmError
from fedhlm.process.run import bus_of
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Forget, MemberSums, Roster
from fedhlm.protocol.roles import cluster_of, edge_name
from fedhlm.telemetry import Counters

# Retained messages arrive right after a subscription; each of them restarts the first wait.
QUIET_S: Final = 1.0
LISTEN_S: Final = 5.0
OBEYED_S: Final = 15.0  # a part lists its members at most once in five seconds
CLOUD: Final = ""

Rosters = Mapping[str, Roster]
"""The latest list of each cluster, and that of the cloud under the name CLOUD."""


class MemberRow(msgspec.Struct, frozen=True, kw_only=True):
    """One member: an agent of `cluster`, or an edge (`cluster` is empty). `silent_s` is its age when the list was made.

    `name` is the name in its certificate, which `forget` takes. `cut` and `refused` count its contributions that were
    cut or rejected; `refused` is by reason.
    """

    cluster: str
    name: str
    agents: int
    seen: float
    weight: float
    harm: float
    silent_s: float
    cut: int
    refused: dict[str, int]


def rows(rosters: Rosters) -> list[MemberRow]:
    """Return all members: the cloud's clusters first, then the agents of each cluster, largest weight first."""
    return [_row(cluster, member) for cluster in sorted(rosters) for member in rosters[cluster].members]


def _row(cluster: str, member: MemberSums) -> MemberRow:
    return MemberRow(
        cluster=cluster,
        name=edge_name(member.name) if cluster == CLOUD else member.name,
        agents=member.agents,
        seen=member.seen,
        weight=member.weight,
        harm=member.harm,
        silent_s=member.silent_s,
        cut=member.blamed.get("cut", 0),
        refused={reason: count for reason, count in member.blamed.items() if reason != "cut"},
    )


async def listed(broker: settings.Broker) -> Rosters:
    """Return the retained lists on a broker.

    Raises:
        BusError: the broker cannot be reached.
    """
    async with _Operator(broker) as operator:
        return await operator.rosters(lambda _: False, quiet_s=QUIET_S, within_s=LISTEN_S)


async def forget(broker: settings.Broker, name: str, *, known_only: bool) -> list[str]:
    """Order all parts to forget what a member contributed. Returns the clusters that have not obeyed within OBEYED_S.

    The broker keeps the order, so that they obey it when they are back.

    Raises:
        BusError: the broker cannot be reached.
        ConfigError: `known_only`, and no part lists a member of this name.
        FedhlmError: the broker took no message.
    """
    async with _Operator(broker) as operator:
        found = await operator.rosters(lambda _: False, quiet_s=QUIET_S, within_s=LISTEN_S)
        names = sorted({row.name for row in rows(found)})
        if known_only and name not in names and not any(roster.left_out for roster in found.values()):
            raise ConfigError("NAME", name, f"a member of the federation: {', '.join(names) or 'none is known here'}")
        order = secrets.randbits(63)
        await operator.order(name, order)
        concerned = {CLOUD} & found.keys() if cluster_of(name) else found.keys()

        def missing(now: Rosters) -> list[str]:
            return sorted(c for c in concerned if order not in now[c].obeyed)

        now = await operator.rosters(lambda now: not missing(now), quiet_s=OBEYED_S, within_s=OBEYED_S)
        return missing(now)


class _Operator:
    """A connection that hears the lists of members."""

    def __init__(self, broker: settings.Broker) -> None:
        client_id = f"operator-{secrets.token_hex(4)}"
        self._bus = bus_of(broker, client_id=client_id, connect_timeout_s=broker.connect_timeout_s)
        self._counters = Counters()
        self._party = Party(bus=self._bus, stamp=Stamp(client_id), counters=self._counters, root=broker.root)
        self._found: dict[str, Roster] = {}

    async def __aenter__(self) -> Self:
        await self._bus.__aenter__()
        root = self._party.root
        await self._bus.subscribe(topics.CLOUD_ROSTER.name(root), topics.ROSTER.name(root, cluster="+"))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._bus.__aexit__(None, None, None)

    async def rosters(self, enough: Callable[[Rosters], bool], *, quiet_s: float, within_s: float) -> Rosters:
        """Listen until the lists are enough, but no longer than `within_s` seconds, or `quiet_s` without a list."""
        until_s = time.monotonic() + within_s
        messages = aiter(self._party.received())
        while not enough(self._found):
            try:
                async with asyncio.timeout(min(quiet_s, until_s - time.monotonic())):
                    received = await anext(messages)
            except (TimeoutError, StopAsyncIteration):
                break
            if isinstance(received.message, Roster):
                self._found[received.levels.get("cluster", CLOUD)] = received.message
        return dict(self._found)

    async def order(self, member: str, number: int) -> None:
        """Publish an order and wait until the broker has taken it."""
        refused = self._bus.statistics.dropped_out
        sent = await self._party.send(topics.FORGET, Forget(**self._party.stamp(), order=number), member=member)
        await self._bus.wait_backlog(0)
        if not sent or self._bus.statistics.dropped_out > refused:
            raise FedhlmError("the broker refused the order: it takes orders from certificates of role operator only")
