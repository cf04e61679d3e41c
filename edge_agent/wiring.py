"""Builds an agent: its connection, its learner, its view of the peers, and its service.

Processes, the simulator and the check of journals all use it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edge_agent.connection import Connection
from edge_agent.core import LEARNER_FILE, AgentCore
from edge_agent.learner import Learner
from edge_agent.membership import birth_and_will
from edge_agent.model import Drafter
from edge_agent.peers import Peers
from edge_agent.profile import Sampler
from edge_agent.service import AgentService, ModelFacts
from edge_agent.turn import NextEvent, next_event
from fedhlm.bus.identity import client_id
from fedhlm.bus.interface import Bus
from fedhlm.bus.party import Stamp
from fedhlm.config import Loaded
from fedhlm.process.runtime import OpenBus, Runtime
from fedhlm.process.saver import Saver
from fedhlm.protocol.messages import Fingerprint
from fedhlm.settings import Config


class SmallModel(NamedTuple):
    """The SLM as an agent needs it. `space` names the space of its context keys."""

    drafter: Drafter
    fingerprint: Fingerprint
    space: str


def agent_of(
    config: Config,
    runtime: Runtime,
    bus: Bus,
    model: SmallModel,
    *,
    new_session: Callable[[], int],
    rng: np.random.Generator,
    stamp: Stamp | None = None,
    next_event: NextEvent = next_event,
    kind: Callable[..., AgentCore] = AgentCore,
    guest: bool = False,
) -> AgentCore:
    """Build the agent `config.agent.id` in `config.cluster` on a bus.

    The agent restores what an earlier life learnt, and begins its journal.

    `new_session` returns numbers below 2**63 that do not repeat among recent ones. `rng` draws the privacy noise and
    the samples for the cloud. `stamp` is given if the sender has sent before. A `guest` knows what the agent of its
    name has learnt, and saves nothing itself.
    """
    federation, consensus, name = config.federation, config.generation.consensus, config.agent.id
    learner = Learner(federation, rng)
    saver = runtime.saver({LEARNER_FILE: learner})
    agent = kind(
        party=runtime.party(bus, stamp or runtime.stamp(name), config.broker.root),
        cluster=config.cluster.name,
        drafter=model.drafter,
        fingerprint=model.fingerprint,
        new_session=new_session,
        learner=learner,
        saver=Saver(None, {}) if guest else saver,
        make_peers=lambda: Peers(
            name, runtime.clock_s, size=consensus.size, max_age_s=consensus.max_age_s, space=model.space
        ),
        # Without a cloud that groups agents, profiles would be useless.
        sampler=Sampler(rng) if federation.assign_s else None,
        clock_s=runtime.clock_s,
        next_event=next_event,
        guest=guest,
    )
    agent.note_start(federation, consensus)
    return agent


def service_of(
    loaded: Loaded,
    runtime: Runtime,
    model: SmallModel,
    facts: ModelFacts,
    *,
    open_bus: OpenBus,
    open_next: OpenBus | None = None,
    new_session: Callable[[], int],
    rng: np.random.Generator,
    kind: Callable[..., AgentCore] = AgentCore,
    guest: str = "",
    alone: bool = False,
) -> AgentService:
    """Build an agent that serves prompts. Call `subscribe`, then enter its `connection`.

    `open_next` opens the connections in clusters to which the agent moves (None: like `open_bus`). A non-empty `guest`,
    which must be unique, makes the agent generate beside the service of its name, which keeps the presence. For `alone`
    see `Connection`.
    """
    config, stamp = loaded.config, runtime.stamp(loaded.config.agent.id)
    root = config.broker.root

    def opened(cluster: str, opener: OpenBus) -> Bus:
        if guest:
            return opener(client_id=client_id("prompt", cluster, stamp.sender, guest, root=root))
        birth, will = birth_and_will(stamp, model.fingerprint, cluster, root)
        return opener(client_id=client_id("agent", cluster, stamp.sender, root=root), birth=birth, will=will)

    bus = opened(config.cluster.name, open_bus)
    agent = agent_of(
        config, runtime, bus, model, new_session=new_session, rng=rng, stamp=stamp, kind=kind, guest=bool(guest)
    )
    following = open_next or open_bus
    connection = Connection(agent.party, lambda cluster: opened(cluster, following), config.cluster.name, alone=alone)
    return AgentService(agent=agent, loaded=loaded, model=facts, connection=connection, in_thread=runtime.in_thread)
