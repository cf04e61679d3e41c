"""`fedhlm edge`: relay one cluster to the cloud, with an MQTT broker of its own when none is configured."""

import asyncio
import logging
from contextlib import AsyncExitStack

import msgspec

from edge_broker.embedded import EmbeddedBroker
from edge_broker.service import EdgeService
from fedhlm.bus.interface import Retained
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.config import Loaded
from fedhlm.process.notify import Notifier
from fedhlm.process.run import bus_of, journal_of, serve
from fedhlm.process.state import store_of
from fedhlm.protocol import topics
from fedhlm.protocol.messages import encode
from fedhlm.settings import Config
from fedhlm.telemetry import Counters

log = logging.getLogger(__name__)


async def run(config: Config, counters: Counters, notifier: Notifier | None = None) -> int:
    """Serve until cancelled. It is ready without the cloud, because its cluster can settle much by itself."""
    notifier = notifier or Notifier()
    cluster = config.cluster.name
    name = f"edge-{cluster}"
    stamp = Stamp(name)
    store = store_of(config.edge.state, key="edge.state")
    broker = config.broker
    async with AsyncExitStack() as stack:
        if not broker.url:
            embedded = EmbeddedBroker(config.edge.embedded_host, config.edge.embedded_port)
            await stack.enter_async_context(embedded)
            broker = msgspec.structs.replace(broker, url=embedded.url)
            log.info("started a broker at %s", embedded.url)
        to_announce = asyncio.Event()
        will = Retained(
            topics.EDGE_STATUS.name(broker.root, cluster=cluster), encode(presence(stamp, "edge", online=False))
        )
        down_bus = bus_of(
            broker, client_id=name, will=will, on_link=notifier.link("the cluster's broker", then=to_announce.set)
        )
        journal = journal_of(config.telemetry)
        down = Party(bus=down_bus, stamp=stamp, counters=counters, root=broker.root, journal=journal)
        up = down
        if config.edge.upstream.url:
            to_cloud = notifier.link("the cloud's broker", needed=False)
            up_bus = bus_of(config.edge.upstream, client_id=name, key="edge.upstream", on_link=to_cloud)
            up = Party(bus=up_bus, stamp=stamp, counters=counters, root=config.edge.upstream.root, journal=journal)
        service = EdgeService(
            cluster=cluster,
            down=down,
            up=up,
            counters=counters,
            batch_max=config.edge.batch_max,
            batch_wait_s=config.edge.batch_wait_ms / 1000.0,
            to_announce=to_announce,
            federation=config.federation,
            memory_max=config.edge.memory,
            store=store,
            bridges=bool(config.edge.upstream.url),
        )
        await service.subscribe()
        for bus in dict.fromkeys((down.bus, up.bus)):
            await stack.enter_async_context(bus)
        log.info("serving cluster %s", cluster)
        notifier.serving()
        await service.run()
    return 0


def main(loaded: Loaded) -> int:
    """Run until a signal; the exit status."""
    config = loaded.config
    return serve(config, f"edge-{config.cluster.name}", lambda counters, notifier: run(config, counters, notifier))
