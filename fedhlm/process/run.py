"""Start and stop of a part: logs, metrics, signals, the service manager and buses."""

import asyncio
import contextlib
import logging
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from fedhlm import settings
from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.bus.interface import LinkHook, Retained
from fedhlm.bus.mqtt import MqttBus
from fedhlm.errors import ConfigError, FedhlmError, root_of
from fedhlm.exposition import exported
from fedhlm.opentelemetry import traced
from fedhlm.process.notify import Notifier
from fedhlm.process.runtime import OpenBus
from fedhlm.spans import Tracer
from fedhlm.telemetry import Counters, configure_logging

log = logging.getLogger(__name__)

# A fleet that the broker has rejected must not return all at once, and the manager's own delays have no jitter.
EXIT_JITTER_S: Final = 10.0
DEFAULT_URL: Final = "mqtt://127.0.0.1:1883"


def configured_model(value: str, *, key: str) -> str:
    """Return the path or URL of the model that the setting `key` names.

    Raises:
        ConfigError: the setting is empty. A part does not search for a model.
    """
    if not value:
        raise ConfigError(key, value, "the path of a model")
    return value


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
    """Make the bus that a broker section describes. An empty URL means DEFAULT_URL. `key` names the section in errors.

    Raises:
        ConfigError: the URL or a certificate file cannot be used.
    """
    return MqttBus(
        address_of(broker, key=key),
        client_id=client_id,
        birth=birth,
        will=will,
        protocol=broker.protocol,
        connect_timeout_s=connect_timeout_s,
        keepalive_s=broker.keepalive_s,
        on_link=on_link,
    )


def address_of(broker: settings.Broker, *, key: str = "broker") -> BrokerUrl:
    """Return the address in a broker section. An empty URL means DEFAULT_URL.

    Raises:
        ConfigError: the URL cannot be used.
    """
    section = broker if broker.url else msgspec.structs.replace(broker, url=DEFAULT_URL)
    return section.address(key=f"{key}.url")


def has_certificate(broker: settings.Broker) -> bool:
    """Whether we log in with a certificate. Brokers of `fedhlm pki mosquitto` then allow its name one connection."""
    return address_of(broker).files.cert is not None


def opener(
    broker: settings.Broker,
    notifier: Notifier,
    link: str,
    *,
    needed: bool = True,
    key: str = "broker",
    connect_timeout_s: float | None = None,
) -> OpenBus:
    """Return a function that opens buses to the broker of a section. Each counts as a connection of the link `link`.

    See `Notifier.link`.
    """

    def open_bus(
        *,
        client_id: str,
        birth: Retained | None = None,
        will: Retained | None = None,
        on_link: LinkHook | None = None,
    ) -> MqttBus:
        return bus_of(
            broker,
            client_id=client_id,
            key=key,
            birth=birth,
            will=will,
            on_link=notifier.link(link, needed=needed, then=on_link),
            connect_timeout_s=connect_timeout_s,
        )

    return open_bus


Main = Callable[[Counters, Notifier, Tracer], Awaitable[int]]


def serve(config: settings.Config, name: str, main: Main, *, on_signal: int = 0) -> int:
    """Run a part until it ends or receives SIGINT or SIGTERM. Returns its exit status; after a signal, `on_signal`.

    `main` connects its links to the notifier, which tells the service manager when the part is ready.
    """
    secrets = (config.broker.password, config.edge.upstream.password)
    configure_logging(config.telemetry.log_level, name, secrets=secrets, form=config.telemetry.log_format)
    counters = Counters()
    notifier = Notifier.of()
    port, host = config.telemetry.metrics_port, config.telemetry.metrics_host
    with (
        exported(counters, party=name, port=port, host=host),
        traced(name, enabled=config.telemetry.opentelemetry) as tracer,
    ):
        return asyncio.run(_until_signal(main(counters, notifier, tracer), notifier, on_signal=on_signal))


async def _until_signal(
    work: Awaitable[int], notifier: Notifier, rng: random.Random | None = None, *, on_signal: int = 0
) -> int:
    task = asyncio.ensure_future(_unhurried(work, notifier, rng or random.SystemRandom()))
    loop = asyncio.get_running_loop()
    alive = loop.create_task(notifier.keep_alive(), name="notify")
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        notifier.stopping()
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # event loops of other platforms have no signal handlers
            loop.add_signal_handler(number, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if stopped:
            return on_signal
        raise
    except BaseExceptionGroup as group:
        raise root_of(group) from group
    finally:
        alive.cancel()


async def _unhurried(work: Awaitable[int], notifier: Notifier, rng: random.Random) -> int:
    """Await the work. Under a service manager, which restarts the part, delay a failure by a random time."""
    try:
        return await work
    except (FedhlmError, BaseExceptionGroup) as exc:
        error = root_of(exc) if isinstance(exc, BaseExceptionGroup) else exc
        if notifier.managed and isinstance(error, FedhlmError):
            delay_s = rng.uniform(0.0, EXIT_JITTER_S)
            log.error("ending in %.1f s: %s", delay_s, error)  # noqa: TRY400 - the caller prints it as well
            await asyncio.sleep(delay_s)
        raise
