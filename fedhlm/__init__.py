"""The base package of fedhlm: messages, topics, buses, decoding, learning, configuration. It imports none of the parts.

The public API is imported from here, as in `from fedhlm import Client`. Each name is loaded at its first use.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any, Final

from fedhlm.version import __version__

if TYPE_CHECKING:
    from fedhlm.answers import Piece, Result
    from fedhlm.client import Answer, Client
    from fedhlm.errors import (
        AgentOffline,
        AskError,
        BusError,
        ConfigError,
        DeadlinePassed,
        FedhlmError,
        PiecesLost,
        RequestCancelled,
        RequestNameTaken,
        RequestRefused,
    )

__all__ = [
    "AgentOffline",
    "Answer",
    "AskError",
    "BusError",
    "Client",
    "ConfigError",
    "DeadlinePassed",
    "FedhlmError",
    "Piece",
    "PiecesLost",
    "RequestCancelled",
    "RequestNameTaken",
    "RequestRefused",
    "Result",
    "__version__",
]

# onnxruntime reports a machine identifier to its maker, and the Hugging Face hub client reports usage. Both read these
# variables when they are imported. That is always after this package, because our modules import `fedhlm` first.
NO_TELEMETRY: Final = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.update(NO_TELEMETRY)

_MODULES: Final = {"Answer": "client", "Client": "client", "Piece": "answers", "Result": "answers"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
