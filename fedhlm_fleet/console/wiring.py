"""Builds what the console and `fedhlm top` need from the settings."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from fedhlm.config import load
from fedhlm.settings import Broker, Config
from fedhlm.telemetry import configure_logging
from fedhlm_fleet.console.state import ConsoleState
from fedhlm_fleet.console.texts import pieces_maker


class Watch(NamedTuple):
    """The settings of a command that watches a fleet, and the brokers that it listens to."""

    settings: Config
    brokers: list[Broker]


def watch_of(name: str, urls: Sequence[str], file: Path | None, keys: Mapping[str, str]) -> Watch:
    """Load the settings of a command and set up its logs. All brokers share one certificate.

    `urls` are those of `--broker`; without any, the broker is that of the settings.

    Raises:
        ConfigError: a key, its value or the file cannot be used.
    """
    broker = {"broker.url": urls[0]} if urls else {}
    settings = load(file=file, flags={**keys, **broker}).config
    configure_logging("ERROR", name, secrets=(settings.broker.password,), form=settings.telemetry.log_format)
    return Watch(settings, [settings.broker, *(replace(settings.broker, url=url) for url in urls[1:])])


def state_maker(settings: Config) -> Callable[[], ConsoleState]:
    """Return a function that makes an empty state.

    Raises:
        ModelError: what is configured has no readable tokenizer.
    """
    pieces, generation = pieces_maker(settings), settings.generation
    return lambda: ConsoleState(pieces, budget=generation.budget, confidence=generation.confidence)
