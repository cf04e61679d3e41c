"""How an edge is put together: its connections, its endpoints on them, its service. Processes, simulator and checks all do it so."""

import asyncio

from edge_broker.service import EdgeService
from fedhlm.bus.identity import client_id
from fedhlm.bus.interface import Retained
from fedhlm.bus.party import presence
from fedhlm.process.runtime import OpenBus, Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.messages import encode
from fedhlm.settings import Config


def name_of(cluster: str) -> str:
    """What a cluster's edge calls itself in messages."""
    return f"edge-{cluster}"


def edge_of(
    config: Config, runtime: Runtime, *, open_down: OpenBus, open_up: OpenBus | None = None, bridges: bool = False
) -> EdgeService:
    """An edge for `config.cluster`; its `buses` are still to be entered, after `subscribe`.

    `open_down` connects to the cluster, `open_up` to the cloud (None: over the same connection). `bridges` says that these are
    two brokers, which do not hand each other's messages over.
    """
    cluster, root = config.cluster.name, config.broker.root
    stamp = runtime.stamp(name_of(cluster))
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
    return EdgeService(config, runtime, down=down, up=up, to_announce=to_announce, bridges=bridges)
