"""Builds a cloud: its connection, its sessions and its service. Processes, the simulator and the checks all use it."""

import asyncio
from typing import Final, NamedTuple

from cloud_verifier.backends.openai import ServedModel
from cloud_verifier.coordinator import Coordinator
from cloud_verifier.engine import DraftModel, Engine
from cloud_verifier.service import CloudService
from cloud_verifier.sessions import SESSIONS_BYTES, Sessions
from fedhlm.bus.identity import client_id
from fedhlm.bus.interface import Retained
from fedhlm.bus.party import presence
from fedhlm.decoding.models import LoadedModel
from fedhlm.decoding.sampling import NOISE
from fedhlm.errors import ModelError
from fedhlm.process.runtime import OpenBus, Runtime
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import Fingerprint
from fedhlm.settings import Config

NAME: Final = "cloud"
"""The cloud's name in messages."""


class LargeModel(NamedTuple):
    """The LLM as a cloud needs it: its engine, and what sessions must know of it. `context` is in tokens.

    `small` is the cloud's own draft model, if it has one.
    """

    engine: Engine
    fingerprint: Fingerprint
    eos_ids: frozenset[int]
    context: int
    small: DraftModel | None = None

    @classmethod
    def of(cls, decoder: LoadedModel, engine: Engine) -> "LargeModel":
        """Describe a loaded model, which `engine` runs."""
        info = decoder.info
        fingerprint = fingerprint_of(*decoder.vocabulary, noise=NOISE, model=info.label)
        return cls(engine, fingerprint, frozenset(info.eos_ids), info.context)

    @classmethod
    def of_server(cls, served: ServedModel) -> "LargeModel":
        """Describe a model that runs on a server."""
        fingerprint = fingerprint_of(*served.vocabulary, noise=NOISE, model=served.name)
        return cls(served.engine, fingerprint, frozenset(served.eos_ids), served.context)

    def beside(self, decoder: LoadedModel, engine: Engine) -> "LargeModel":
        """The same model with another one as its draft model, which `engine` runs.

        Raises:
            ModelError: the models have different tokenizers.
        """
        small = fingerprint_of(*decoder.vocabulary, noise=NOISE, model=decoder.info.label)
        if (small.tokenizer, small.vocab_size) != (self.fingerprint.tokenizer, self.fingerprint.vocab_size):
            raise ModelError(
                f"cloud.draft_model must have the tokenizer of cloud.model, {self.fingerprint.model} "
                f"(got {small.model})"
            )
        return self._replace(small=DraftModel(engine, decoder.info.context))

    def sessions(self, sessions_max: int, sessions_bytes: int = SESSIONS_BYTES) -> Sessions:
        """Create an empty store for at most `sessions_max` sessions with `sessions_bytes` bytes of contexts."""
        return Sessions(
            fingerprint=self.fingerprint,
            eos_ids=self.eos_ids,
            context_max=self.context,
            sessions_max=sessions_max,
            sessions_bytes=sessions_bytes,
            constrain=self.engine.constrain,
            told=self.engine.told,
        )


def cloud_of(
    config: Config,
    runtime: Runtime,
    model: LargeModel,
    *,
    open_bus: OpenBus,
    sessions: Sessions | None = None,
    coordinator: Coordinator | None = None,
) -> CloudService:
    """Build a cloud. Call `subscribe`, then enter its `bus`.

    `sessions` and `coordinator` are created from the settings unless they are given.
    """
    stamp = runtime.stamp(NAME)
    status = topics.CLOUD_STATUS.name(config.broker.root)
    to_announce = asyncio.Event()
    bus = open_bus(
        client_id=client_id("cloud", root=config.broker.root),
        birth=Retained(status, encode(presence(stamp, "cloud", online=True, fingerprint=model.fingerprint))),
        will=Retained(status, encode(presence(stamp, "cloud", online=False))),
        on_link=lambda _up: to_announce.set(),
    )
    return CloudService(
        config,
        runtime,
        party=runtime.party(bus, stamp, config.broker.root),
        engine=model.engine,
        small=model.small,
        sessions=model.sessions(config.cloud.sessions_max, config.cloud.sessions_bytes)
        if sessions is None
        else sessions,
        coordinator=coordinator or Coordinator.of(config.federation),
        to_announce=to_announce,
    )
