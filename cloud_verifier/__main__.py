"""`fedhlm cloud`: load the LLM and verify the blocks of every cluster on the broker."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from cloud_verifier.backends.in_process import threaded
from cloud_verifier.backends.openai import is_url, served
from cloud_verifier.local import ModelAlone
from cloud_verifier.wiring import NAME, LargeModel, cloud_of
from fedhlm.answering import Door, Offer, shut
from fedhlm.config import Loaded
from fedhlm.decoding.invariance import TOLERANCE, block_difference, steadier
from fedhlm.decoding.models import LoadedModel, load_model
from fedhlm.process.notify import Notifier
from fedhlm.process.run import configured_model, opener, serve
from fedhlm.process.runtime import Runtime
from fedhlm.process.state import store_of
from fedhlm.settings import Cloud, Config
from fedhlm.spans import PASSING, Tracer
from fedhlm.telemetry import Counters

log = logging.getLogger(__name__)


async def run(
    config: Config,
    counters: Counters,
    notifier: Notifier | None = None,
    tracer: Tracer = PASSING,
    *,
    door: Door = shut,
) -> int:
    """Serve until cancelled, and return exit status 0. `door` lets in clients on this machine meanwhile."""
    notifier = notifier or Notifier()
    store = store_of(config.cloud.state, key="cloud.state")
    runtime = Runtime.of_process(counters, store=store, journal=config.telemetry.journal, tracer=tracer)
    async with opened(config.cloud) as (large, offer), drafting(config.cloud, large) as model:
        service = cloud_of(config, runtime, model, open_bus=opener(config.broker, notifier, "the broker"))
        await service.subscribe()
        async with service.bus, door(ModelAlone(service, model, config.generation, offer)):
            log.info("verifying with %s (%d parameters, %s)", offer.name, offer.parameters, offer.quantisation)
            notifier.serving()
            await service.run()
    return 0


@asynccontextmanager
async def opened(cloud: Cloud) -> AsyncIterator[tuple[LargeModel, Offer]]:
    """Open the model of these settings, which may run on a server, and say what it offers to local clients."""
    if is_url(cloud.model):
        async with served(cloud.model, cloud.server) as found:
            offer = Offer(
                found.name, found.folder, found.tokenizer, found.bos_id, found.context, quantisation=f"at {cloud.model}"
            )
            yield LargeModel.of_server(found), offer
        return
    path = configured_model(cloud.model, key="cloud.model")
    decoder = load_model(
        path,
        threads=cloud.threads,
        providers=cloud.providers,
        keeps_memory=False,
        dtype=cloud.dtype,
        context=cloud.context,
    )
    warn_of_blocks(decoder)
    async with threaded(decoder) as engine:
        offer = Offer.of(decoder, Path(path), name=decoder.info.name, probabilities=True)
        yield LargeModel.of(decoder, engine), offer


@asynccontextmanager
async def drafting(cloud: Cloud, model: LargeModel) -> AsyncIterator[LargeModel]:
    """The same model with the draft model of these settings, if there is one."""
    if not cloud.draft_model:
        yield model
        return
    small = load_model(cloud.draft_model, threads=cloud.threads, providers=cloud.providers, context=cloud.context)
    async with threaded(small) as engine:
        yield model.beside(small, engine)


def warn_of_blocks(decoder: LoadedModel) -> None:
    """Log a warning if this model cannot keep the promise of `exact`."""
    if (difference := block_difference(decoder)) > TOLERANCE:
        log.warning(
            "the logits of %s (%s) change by up to %.3g with the size of a block: texts will leave those that it "
            "writes alone; %s",
            decoder.info.name,
            decoder.info.quantisation,
            difference,
            steadier(decoder.info),
        )


def main(loaded: Loaded, *, door: Door = shut) -> int:
    """Run until a signal arrives, and return the exit status. For `door` see `run`."""
    config = loaded.config
    return serve(config, NAME, partial(run, config, door=door))
