"""The cards of a cluster's agents over A2A: an edge sees to it that they say who is there.

An agent's own last will is its presence, and a second connection with another one would end the first where a broker
allows one connection per certificate. So the edge publishes the card of a lost agent again, as offline.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from edge_broker.service import AGENTS_MAX, EdgeService
from fedhlm.a2a import LOST, ONLINE
from fedhlm.bus.interface import Delivery, Extras
from fedhlm.errors import BusError
from fedhlm.protocol.open_topics import A2A_CARD
from fedhlm.settings import Config
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

CARD_MAX: Final = 65_536  # bytes of a card; larger ones are left alone


class AgentCards:
    """Keeps the status of cards true: that of a lost agent, and of one that was lost and is back.

    Cards and presences come in any order, this edge's own cards included. Whatever comes last, the card ends up as the
    presence says.
    """

    def __init__(self, service: EdgeService, config: Config) -> None:
        self._service = service
        self._org = config.a2a.org
        self._cards: dict[str, tuple[bytes, Extras]] = {}
        self._online: dict[str, bool] = {}

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Look after cards for as long as the context is entered."""
        filters = {A2A_CARD.name(org=self._org, cluster=self._service.cluster, agent="+"): self._hear}
        self._service.tell_agent.append(self._see)
        try:
            await self._service.down.listen(filters)
        except BusError as exc:
            warn_once(log, "a2a", "cards of lost agents will stay online: %s", exc)
        try:
            yield
        finally:
            self._service.tell_agent.remove(self._see)

    async def _hear(self, delivery: Delivery) -> None:
        agent = delivery.topic.rpartition("/")[2]
        self._cards.pop(agent, None)
        if 0 < len(delivery.payload) <= CARD_MAX and delivery.extras is not None:
            self._cards[agent] = (delivery.payload, delivery.extras)
        while len(self._cards) > AGENTS_MAX:
            self._cards.pop(next(iter(self._cards)))
        await self._mend(agent)

    async def _see(self, agent: str, online: bool) -> None:
        self._online.pop(agent, None)
        self._online[agent] = online
        while len(self._online) > AGENTS_MAX:
            self._online.pop(next(iter(self._online)))
        await self._mend(agent)

    async def _mend(self, agent: str) -> None:
        payload, said = self._cards.get(agent, (b"", None))
        online = self._online.get(agent)
        if said is None or online is None:
            return
        wanted = {(True, LOST.user): ONLINE, (False, ONLINE.user): LOST}.get((online, said.user))
        if wanted is not None:
            topic = A2A_CARD.name(org=self._org, cluster=self._service.cluster, agent=agent)
            await self._service.down.bus.publish(
                topic, payload, qos=A2A_CARD.qos, retain=A2A_CARD.retain, extras=wanted
            )  # fmt: skip
