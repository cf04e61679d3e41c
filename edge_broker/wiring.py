"""Builds an edge: its connections, its endpoints on them, and its service.

Processes, the simulator and the checks all use it.
"""

import asyncio

from edge_broker.service import EdgeService
from fedhlm.bus.identity import client_id
from fedhlm.bus.interface import Retained
from fedhlm.bus.party import presence
from fedhlm.process.runtime import OpenBus, Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.roles import edge_name
from fedhlm.settings import Config


def edge_of(
    config: Config, runtime: Runtime, *, open_down: OpenBus, open_up: OpenBus | None = None, bridges: bool = False
) -> EdgeService:
    """Build an edge for `config.cluster`. Call `subscribe`, then enter its `buses`.

    `open_down` connects to the cluster's broker. `open_up` connects to the cloud's broker (None: one connection serves
    both). `bridges` says that these are two brokers that do not forward each other's messages.
    """
    cluster, root = config.cluster.name, config.broker.root
    stamp = runtime.stamp(edge_name(cluster))
    to_announce = asyncio.Event()
    offline = encode(presence(stamp, "edge", online=False))
    down_bus = open_down(
        client_id=client_id("edge", cluster, root=root),
        will=Retained(topics.EDGE_STATUS.name(root, cluster=cluster), offline),
        on_link=lambda _up: to_announce.set(),
    )
    down = up = runtime.party(down_bus, stamp, root)
    if open_up is not None:
        above = config.edge.upstream.root
        up = runtime.party(open_up(client_id=client_id("edge-up", cluster, root=above)), stamp, above)
        up.extras = down.spans.extras  # blocks come in at one side and go out at the other
    return EdgeService(config, runtime, down=down, up=up, to_announce=to_announce, bridges=bridges)
