"""Builds what the console and `fedhlm top` need from the settings."""

import contextlib
import sys
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from fedhlm.errors import ModelError
from fedhlm.settings import Broker, Config
from fedhlm_fleet.console.state import ConsoleState
from fedhlm_fleet.console.texts import Pieces, tokenizer_of
from fedhlm_zoo.shipped import model_folder


def brokers_of(settings: Config, further: Sequence[str]) -> list[Broker]:
    """The broker of the settings, and others at these URLs with the same certificate."""
    return [settings.broker, *(replace(settings.broker, url=url) for url in further)]


def state_maker(settings: Config) -> Callable[[], ConsoleState]:
    """Return a function that makes an empty state, with the tokenizer of `agent.model` or of the shipped model.

    Raises:
        ModelError: `agent.model` has no readable tokenizer.
    """
    tokenizer = None
    try:
        with contextlib.suppress(ModuleNotFoundError):  # texts are then shown message by message
            tokenizer = tokenizer_of(model_folder(settings.agent.model, "slm"))
    except ModelError as exc:
        if settings.agent.model:
            raise
        print(f"fedhlm: texts are shown message by message: {exc}", file=sys.stderr)
    generation = settings.generation
    return lambda: ConsoleState(lambda: Pieces(tokenizer), budget=generation.budget, confidence=generation.confidence)
