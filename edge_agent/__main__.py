"""`fedhlm agent`: load the small model and serve prompts from the bus, or one prompt from the command line."""

import asyncio
import logging
import random
import sys

from edge_agent.agent import Agent
from edge_agent.model import Slm, ThreadedDrafter
from edge_agent.service import AgentService, ModelFacts
from fedhlm import topics
from fedhlm.bus import Retained
from fedhlm.config import Loaded
from fedhlm.decoder import Decoder
from fedhlm.errors import FedhlmError
from fedhlm.fingerprint import fingerprint_of
from fedhlm.messages import Prompt, encode
from fedhlm.party import Party, Stamp, presence
from fedhlm.sampling import NOISE
from fedhlm.serve import bus_of, model_folder, serve
from fedhlm.telemetry import Counters

log = logging.getLogger(__name__)


async def run(loaded: Loaded, counters: Counters, prompt: str | None = None) -> int:
    """Serve until cancelled, or until `prompt` is answered; exit status 1 when its answer is an error."""
    config = loaded.config
    decoder = Decoder.load(model_folder(config.agent.model, "slm"), threads=config.agent.threads)
    info = decoder.info
    fingerprint = fingerprint_of(decoder.tokenizer_digest, info.vocab_size, noise=NOISE, model=info.name)
    name, cluster, root = config.agent.id, config.cluster.name, config.broker.root
    stamp = Stamp(name)
    status = topics.AGENT_STATUS.name(root, cluster=cluster, agent=name)
    bus = bus_of(
        config.broker,
        client_id=f"{cluster}-{name}",
        birth=Retained(status, encode(presence(stamp, "agent", online=True, fingerprint=fingerprint))),
        will=Retained(status, encode(presence(stamp, "agent", online=False))),
        connect_timeout_s=None if prompt is None else config.broker.connect_timeout_s,
    )
    async with ThreadedDrafter(Slm(decoder)) as drafter:
        agent = Agent(
            party=Party(bus=bus, stamp=stamp, counters=counters, root=root),
            cluster=cluster,
            drafter=drafter,
            fingerprint=fingerprint,
            counters=counters,
            new_session=lambda: random.SystemRandom().getrandbits(32),
        )
        model = ModelFacts(decoder.tokenizer, info.bos_id, frozenset(info.eos_ids), info.context)
        service = AgentService(agent=agent, loaded=loaded, model=model, counters=counters)
        await service.subscribe()
        async with bus:
            log.info("drafting with %s (%d parameters, %s)", info.name, info.parameters, info.quantisation)
            if prompt is None:
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
    return serve(loaded.config, loaded.config.agent.id, lambda counters: run(loaded, counters, prompt))
