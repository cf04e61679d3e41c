"""`fedhlm cloud`: load the large model and verify for every cluster on the broker."""

import asyncio
import logging

from cloud_verifier.backends.onnx import threaded
from cloud_verifier.coordinator import Coordinator
from cloud_verifier.service import CloudService
from cloud_verifier.sessions import Sessions
from fedhlm.bus.interface import Retained
from fedhlm.bus.party import Party, Stamp, presence
from fedhlm.config import Loaded
from fedhlm.decoding.decoder import Decoder
from fedhlm.decoding.sampling import NOISE
from fedhlm.process.notify import Notifier
from fedhlm.process.run import bus_of, configured_folder, serve
from fedhlm.process.runtime import Runtime
from fedhlm.process.state import store_of
from fedhlm.protocol import topics
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import encode
from fedhlm.settings import Config
from fedhlm.telemetry import Counters

log = logging.getLogger(__name__)

NAME = "cloud"


async def run(config: Config, counters: Counters, notifier: Notifier | None = None) -> int:
    """Serve until cancelled."""
    notifier = notifier or Notifier()
    store = store_of(config.cloud.state, key="cloud.state")
    runtime = Runtime.of_process(counters, store=store, journal=config.telemetry.journal)
    folder = configured_folder(config.cloud.model, key="cloud.model")
    decoder = Decoder.load(folder, threads=config.cloud.threads, providers=config.cloud.providers)
    info = decoder.info
    fingerprint = fingerprint_of(decoder.tokenizer_digest, info.vocab_size, noise=NOISE, model=info.name)
    stamp = Stamp(NAME)
    status = topics.CLOUD_STATUS.name(config.broker.root)
    to_announce = asyncio.Event()
    bus = bus_of(
        config.broker,
        client_id=NAME,
        birth=Retained(status, encode(presence(stamp, "cloud", online=True, fingerprint=fingerprint))),
        will=Retained(status, encode(presence(stamp, "cloud", online=False))),
        on_link=notifier.link("the broker", then=lambda _up: to_announce.set()),
    )
    sessions = Sessions(
        fingerprint=fingerprint,
        eos_ids=frozenset(info.eos_ids),
        context_max=info.context,
        sessions_max=config.cloud.sessions_max,
    )
    async with threaded(decoder) as engine:
        service = CloudService(
            party=Party(bus=bus, stamp=stamp, counters=counters, root=config.broker.root, journal=runtime.journal),
            engine=engine,
            sessions=sessions,
            counters=counters,
            batch_max=config.cloud.batch_max,
            batch_wait_s=config.cloud.batch_wait_ms / 1000.0,
            coordinator=Coordinator.of(config.federation),
            assign_s=config.federation.assign_s,
            store=store,
            to_announce=to_announce,
        )
        await service.subscribe()
        async with bus:
            log.info("verifying with %s (%d parameters, %s)", info.name, info.parameters, info.quantisation)
            notifier.serving()
            await service.run()
    return 0


def main(loaded: Loaded) -> int:
    """Run until a signal; the exit status."""
    config = loaded.config
    return serve(config, NAME, lambda counters, notifier: run(config, counters, notifier))
