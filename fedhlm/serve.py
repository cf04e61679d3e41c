"""Starting and stopping a service: logs, metrics, signals, buses and shipped models, the same for every part."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from fedhlm import settings
from fedhlm.bus import LinkHook, Retained
from fedhlm.errors import ModelError, root_of
from fedhlm.journal import Diary
from fedhlm.mqtt import MqttBus
from fedhlm.telemetry import Counters, configure_logging, exported

DEFAULT_URL: Final = "mqtt://127.0.0.1:1883"
_ARTEFACTS: Final = Path(__file__).parent.parent / "model_zoo" / "artefacts"


def model_folder(configured: str, shipped: str) -> Path:
    """The configured model folder, or the shipped one ("slm" or "llm") when none is.

    Raises:
        ModelError: nothing is configured and this installation carries no models.
    """
    if configured:
        return Path(configured)
    folder = _ARTEFACTS / shipped
    if not folder.is_dir():
        raise ModelError(f"this installation carries no {shipped}: give a model folder made by 'fedhlm models export'")
    return folder


def bus_of(
    broker: settings.Broker,
    *,
    client_id: str,
    key: str = "broker",
    birth: Retained | None = None,
    will: Retained | None = None,
    on_link: LinkHook | None = None,
    connect_timeout_s: float | None = None,
) -> MqttBus:
    """The bus that a broker section describes; an empty URL means DEFAULT_URL. `key` names the section in errors.

    Raises:
        ConfigError: the URL or a certificate file cannot be used.
    """
    section = broker if broker.url else msgspec.structs.replace(broker, url=DEFAULT_URL)
    return MqttBus(
        section.address(key=f"{key}.url"),
        client_id=client_id,
        birth=birth,
        will=will,
        protocol=broker.protocol,
        connect_timeout_s=connect_timeout_s,
        on_link=on_link,
    )


def diary_of(telemetry: settings.Telemetry) -> Diary | None:
    """The journal of a part on real time, where one is asked for."""
    return Diary(random.SystemRandom().getrandbits(63), time.monotonic) if telemetry.journal else None


def serve(config: settings.Config, name: str, main: Callable[[Counters], Awaitable[int]]) -> int:
    """Run a service until it ends or SIGINT or SIGTERM asks it to; its exit status, 0 after a signal."""
    secrets = (config.broker.password, config.edge.upstream.password)
    configure_logging(config.telemetry.log_level, name, secrets=secrets)
    counters = Counters()
    with exported(counters, party=name, port=config.telemetry.metrics_port, host=config.telemetry.metrics_host):
        return asyncio.run(_until_signal(main(counters)))


async def _until_signal(work: Awaitable[int]) -> int:
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # event loops of other platforms have no signal handlers
            loop.add_signal_handler(number, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if stopped:
            return 0
        raise
    except BaseExceptionGroup as group:
        raise root_of(group) from group
