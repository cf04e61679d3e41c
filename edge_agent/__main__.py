"""`fedhlm agent`: load the SLM and serve prompts from the bus, or one prompt from the command line."""

import asyncio
import logging
import random
import secrets
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.a2a import AgentA2a
from edge_agent.home import AgentHome
from edge_agent.local import LocalQuestions
from edge_agent.model import Slm, threaded
from edge_agent.service import AgentService, ModelFacts
from edge_agent.wiring import SmallModel, service_of
from fedhlm.answering import Door, Offer, shut
from fedhlm.answers import Marks
from fedhlm.bus.silent import silent
from fedhlm.choices import GATES
from fedhlm.config import Loaded
from fedhlm.decoding.models import load_model
from fedhlm.decoding.sampling import NOISE
from fedhlm.decoding.translated import in_ids_of
from fedhlm.errors import FedhlmError
from fedhlm.peers.context_keys import load_projection
from fedhlm.process.notify import Notifier
from fedhlm.process.run import configured_model, has_certificate, opener, serve
from fedhlm.process.runtime import Runtime
from fedhlm.process.state import store_of
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import Prompt
from fedhlm.receipts import Sign, unsigned
from fedhlm.spans import PASSING, Tracer
from fedhlm.telemetry import Counters

INTERRUPTED: Final = 130
NAME: Final = "fedhlm"
"""The model that local clients ask for; a preset may follow after a colon."""

log = logging.getLogger(__name__)

PRESENCE_S = 3.0  # seconds; the broker sends retained messages at once, which takes a second over a satellite link


async def run(
    loaded: Loaded,
    counters: Counters,
    prompt: str | None = None,
    *,
    notifier: Notifier | None = None,
    tracer: Tracer = PASSING,
    door: Door = shut,
    sign: Sign = unsigned,
) -> int:
    """Serve until cancelled, or until `prompt` is answered. Return exit status 0.

    `door` lets in clients on this machine while the agent serves, and `sign` signs receipts.

    Raises:
        FedhlmError: the answer to `prompt` is an error.
    """
    notifier = notifier or Notifier()
    config = loaded.config
    path = configured_model(config.agent.model, key="agent.model")
    decoder = load_model(
        path,
        threads=config.agent.threads,
        providers=config.agent.providers,
        drafting=True,
        context=config.agent.context,
    )
    target = config.agent.target_tokenizer
    decoder = in_ids_of(target, decoder)
    info = decoder.info
    fingerprint = fingerprint_of(*decoder.vocabulary, noise=NOISE, model=info.label)
    projection = load_projection(Path(path), info.hidden_size)
    store = store_of(config.agent.state, key="agent.state")
    runtime = Runtime.of_process(counters, store=store, journal=config.telemetry.journal, tracer=tracer)
    # A service waits for its broker without limit. A command line, or a second connection, does not.
    patient, impatient = (
        opener(config.broker, notifier, "the broker", connect_timeout_s=limit_s)
        for limit_s in (None, config.broker.connect_timeout_s)
    )
    if prompt is not None and GATES[config.generation.gate].alone:
        impatient = silent  # this gate needs neither edge nor cloud
    alone = has_certificate(config.broker)
    async with threaded(Slm(decoder, projection)) as drafter:
        service = service_of(
            loaded,
            runtime,
            SmallModel(drafter, fingerprint, projection.digest[:8]),
            ModelFacts(decoder.tokenizer, info.bos_id, frozenset(info.eos_ids), info.context, decoder.constrain),
            open_bus=patient if prompt is None else impatient,
            open_next=patient if alone else impatient,
            new_session=lambda: random.SystemRandom().getrandbits(32),
            rng=np.random.default_rng(),
            guest="" if prompt is None else secrets.token_hex(8),
            alone=alone,
        )
        service.sign = sign
        await service.subscribe()
        async with service.connection:
            about = f"drafting with {info.name} ({info.parameters} parameters, {info.quantisation})"
            if prompt is None:
                offer = Offer.of(decoder, Path(target or path), name=NAME, presets=loaded.allowed)
                questions = LocalQuestions(service, offer)
                home, a2a = (kind(service, questions, config, counters) for kind in (AgentHome, AgentA2a))
                async with (
                    door(questions),
                    home.kept() if config.home_assistant.enabled else nullcontext(),
                    a2a.kept() if config.a2a.enabled else nullcontext(),
                ):
                    log.info(about)
                    notifier.serving()
                    await service.run()
                return 0
            log.info(about)
            return await _answer(service, loaded, prompt)


async def _answer(service: AgentService, loaded: Loaded, text: str) -> int:
    """Serve the command line's prompt and print its text as it is committed."""
    generation = loaded.config.generation
    prompt = Prompt(
        **service.agent.party.stamp(),
        request="command-line",
        text=text,
        max_tokens=generation.max_tokens,
        seed=generation.seed,
    )
    marks = Marks()
    running = asyncio.create_task(service.run(), name="agent-service")
    try:
        if not GATES[generation.gate].alone:
            await service.agent.look_around(PRESENCE_S)
        result = await service.complete(prompt, show=lambda piece: print(marks.put(piece), end="", flush=True))
    except ValueError as exc:
        raise FedhlmError(str(exc)) from exc
    finally:
        running.cancel()
        await asyncio.wait([running])
    print(marks.end())
    if marks.unverified:
        print(marks.summary(), file=sys.stderr)
    print("; ".join(f"{key} {value:g}" for key, value in result.statistics().items()), file=sys.stderr)
    if result.finish == "error":
        raise FedhlmError(result.error)
    return 0


def main(loaded: Loaded, prompt: str | None = None, *, door: Door = shut, sign: Sign = unsigned) -> int:
    """Run until a signal arrives, or until `prompt` is answered, and return the exit status. For the rest see `run`."""
    return serve(
        loaded.config,
        loaded.config.agent.id,
        lambda counters, notifier, tracer: run(
            loaded, counters, prompt, notifier=notifier, tracer=tracer, door=door, sign=sign
        ),
        on_signal=0 if prompt is None else INTERRUPTED,
    )
