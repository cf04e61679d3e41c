"""`fedhlm agent`: load the small model and serve prompts from the bus, or one prompt from the command line."""

import asyncio
import logging
import random
import sys
import time

import numpy as np

from edge_agent.connection import Connection
from edge_agent.driver import Agent
from edge_agent.learner import Learner
from edge_agent.membership import birth_and_will
from edge_agent.model import Slm, threaded
from edge_agent.peers import Peers
from edge_agent.profile import Sampler
from edge_agent.service import AgentService, ModelFacts
from fedhlm.bus.interface import Bus
from fedhlm.bus.party import Party, Stamp
from fedhlm.config import Loaded
from fedhlm.decoding.decoder import Decoder
from fedhlm.decoding.sampling import NOISE
from fedhlm.errors import FedhlmError
from fedhlm.peers.context_keys import load_projection
from fedhlm.process.notify import Notifier
from fedhlm.process.run import bus_of, configured_folder, journal_of, serve
from fedhlm.process.state import store_of
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import Prompt
from fedhlm.telemetry import Counters

log = logging.getLogger(__name__)


async def run(
    loaded: Loaded, counters: Counters, prompt: str | None = None, *, notifier: Notifier | None = None
) -> int:
    """Serve until cancelled, or until `prompt` is answered; exit status 1 when its answer is an error."""
    notifier = notifier or Notifier()
    config = loaded.config
    folder = configured_folder(config.agent.model, key="agent.model")
    decoder = Decoder.load(folder, threads=config.agent.threads, providers=config.agent.providers)
    info = decoder.info
    fingerprint = fingerprint_of(decoder.tokenizer_digest, info.vocab_size, noise=NOISE, model=info.name)
    name, cluster, root = config.agent.id, config.cluster.name, config.broker.root
    stamp = Stamp(name)

    def open_bus(home: str, connect_timeout_s: float | None = config.broker.connect_timeout_s) -> Bus:
        birth, will = birth_and_will(stamp, fingerprint, home, root)
        client_id = f"{home}-{name}"
        return bus_of(
            config.broker,
            client_id=client_id,
            birth=birth,
            will=will,
            on_link=notifier.link("the broker"),
            connect_timeout_s=connect_timeout_s,
        )

    # A service waits for its broker as long as it takes; a command line, or a second connection, does not.
    bus = open_bus(cluster, None) if prompt is None else open_bus(cluster)
    party = Party(bus=bus, stamp=stamp, counters=counters, root=root, journal=journal_of(config.telemetry))
    projection = load_projection(folder, info.hidden_size)
    consensus = config.generation.consensus
    rng = np.random.default_rng()
    async with threaded(Slm(decoder, projection)) as drafter:
        agent = Agent(
            party=party,
            cluster=cluster,
            drafter=drafter,
            fingerprint=fingerprint,
            counters=counters,
            new_session=lambda: random.SystemRandom().getrandbits(32),
            learner=Learner(config.federation, rng),
            make_peers=lambda: Peers(
                name, time.monotonic, size=consensus.size, max_age_s=consensus.max_age_s, space=projection.digest[:8]
            ),
            # Without a cloud that groups agents a profile would only cost its bytes.
            sampler=Sampler(rng) if config.federation.assign_s else None,
        )
        model = ModelFacts(decoder.tokenizer, info.bos_id, frozenset(info.eos_ids), info.context)
        store = store_of(config.agent.state, key="agent.state")
        connection = Connection(party, open_bus, cluster)
        service = AgentService(
            agent=agent, loaded=loaded, model=model, counters=counters, store=store, connection=connection
        )
        await service.subscribe()
        async with connection:
            log.info("drafting with %s (%d parameters, %s)", info.name, info.parameters, info.quantisation)
            if prompt is None:
                notifier.serving()
                await service.run()
                return 0
            return await _answer(service, loaded, prompt)


async def _answer(service: AgentService, loaded: Loaded, text: str) -> int:
    """Serve one prompt of the command line and print its text as it is committed."""
    generation = loaded.config.generation
    prompt = Prompt(
        **service.agent.party.stamp(),
        request="command-line",
        text=text,
        max_tokens=generation.max_tokens,
        seed=generation.seed,
    )
    running = asyncio.create_task(service.run(), name="agent-service")
    try:
        result = await service.complete(prompt, show=lambda new: print(new, end="", flush=True))
    except ValueError as exc:
        raise FedhlmError(str(exc)) from exc
    finally:
        running.cancel()
        await asyncio.wait([running])
    print()
    print("; ".join(f"{key} {value:g}" for key, value in result.statistics().items()), file=sys.stderr)
    if result.finish == "error":
        raise FedhlmError(result.error)
    return 0


def main(loaded: Loaded, prompt: str | None = None) -> int:
    """Run until a signal, or until `prompt` is answered; the exit status."""
    return serve(
        loaded.config,
        loaded.config.agent.id,
        lambda counters, notifier: run(loaded, counters, prompt, notifier=notifier),
    )
