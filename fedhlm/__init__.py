"""The ground floor of fedhlm: messages, topics, buses, sampling, configuration. It imports none of the parts.

What users hold is imported from here: `from fedhlm import Client`. It is loaded when it is first asked for.
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

# onnxruntime keeps an identifier of the machine and reports to its maker; the hub's client counts its users. Both read these
# names when they are imported, which is after this package: none of ours imports them at its top, and each imports `fedhlm`.
NO_TELEMETRY: Final = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.update(NO_TELEMETRY)

_MODULES: Final = {"Answer": "client", "Client": "client", "Piece": "answers", "Result": "answers"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
