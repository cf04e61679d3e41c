"""`fedhlm edge`: connect one cluster to the cloud. Starts an MQTT broker if none is configured."""

import logging
from contextlib import AsyncExitStack
from functools import partial

import msgspec

from edge_broker.a2a import AgentCards
from edge_broker.embedded import EmbeddedBroker
from edge_broker.home import EdgeHome
from edge_broker.wiring import edge_of
from fedhlm.config import Loaded
from fedhlm.process.notify import Notifier
from fedhlm.process.run import address_of, opener, serve
from fedhlm.process.runtime import Runtime
from fedhlm.process.state import store_of
from fedhlm.protocol.roles import edge_name
from fedhlm.settings import Broker, Config
from fedhlm.spans import PASSING, Tracer
from fedhlm.telemetry import Counters

log = logging.getLogger(__name__)


async def run(config: Config, counters: Counters, notifier: Notifier | None = None, tracer: Tracer = PASSING) -> int:
    """Serve until cancelled, and return exit status 0.

    The edge does not wait for the cloud, because it can answer some blocks itself.
    """
    notifier = notifier or Notifier()
    store = store_of(config.edge.state, key="edge.state")
    runtime = Runtime.of_process(counters, store=store, journal=config.telemetry.journal, tracer=tracer)
    broker, upstream = config.broker, config.edge.upstream
    async with AsyncExitStack() as stack:
        if not broker.url:
            embedded = EmbeddedBroker(config.edge.embedded_host, config.edge.embedded_port)
            await stack.enter_async_context(embedded)
            counters.follow(
                embedded.counts,
                broker_connections="connected",
                broker_takeovers="taken_over",
                broker_silences="silent",
                broker_refusals="refused",
                broker_received="received",
                broker_sent="sent",
                broker_dropped="dropped",
            )
            broker = msgspec.structs.replace(broker, url=embedded.url)
            log.info("started a broker at %s", embedded.url)
        bridges = bool(upstream.url) and not same_place(broker, upstream)
        if upstream.url and not bridges:
            log.info("edge.upstream is the cluster's own broker: one connection serves both sides")
        service = edge_of(
            config,
            runtime,
            open_down=opener(broker, notifier, "the cluster's broker"),
            open_up=opener(upstream, notifier, "the cloud's broker", needed=False, key="edge.upstream")
            if bridges
            else None,
            bridges=bridges,
        )
        await service.subscribe()
        for bus in service.buses:
            await stack.enter_async_context(bus)
        if config.home_assistant.enabled:
            await stack.enter_async_context(EdgeHome(service, config, counters).kept())
        if config.a2a.enabled:
            await stack.enter_async_context(AgentCards(service, config).kept())
        log.info("serving cluster %s", config.cluster.name)
        notifier.serving()
        await service.run()
    return 0


def same_place(below: Broker, above: Broker) -> bool:
    """Whether both addresses name the same broker and the same topic root, as far as the addresses tell."""
    here, there = address_of(below), address_of(above, key="edge.upstream")
    hosts = {here.host.lower(), there.host.lower()}
    near = hosts <= {"localhost", "127.0.0.1", "::1"}
    return (len(hosts) == 1 or near) and here.port == there.port and below.root == above.root


def main(loaded: Loaded) -> int:
    """Run until a signal arrives, and return the exit status."""
    config = loaded.config
    return serve(config, edge_name(config.cluster.name), partial(run, config))
