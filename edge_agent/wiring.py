"""How an agent is put together: its connection, what it has learnt, its view of the peers, its service.

Processes, the simulator and the check of journals all do it so.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edge_agent.connection import Connection
from edge_agent.driver import LEARNER_FILE, AgentCore
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
    """The SLM as an agent needs it; `space` names what its context keys are made with."""

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
    """An agent `config.agent.id` in `config.cluster` on a bus, with what an earlier life learnt; its journal begins.

    `new_session` gives numbers below 2**63 that do not repeat among recent ones; `rng` draws privacy's noise and the samples
    that the cloud sees. `stamp` is the sender's where it has sent before. A `guest` knows what its namesake has learnt, and
    keeps nothing itself.
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
        # Without a cloud that groups agents a profile would only cost its bytes.
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
    """An agent that serves prompts; its `connection` is still to be entered, after `subscribe`.

    `open_next` makes the connections that follow the first, in the clusters to which the agent moves (None: as `open_bus`).
    With a word that nobody else has as `guest` it writes beside the service of its name, which presence is left to. `alone`:
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
    return AgentService(agent=agent, loaded=loaded, model=facts, connection=connection)
