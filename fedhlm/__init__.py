"""The ground floor of fedhlm: messages, topics, buses, sampling, configuration. It imports none of the parts."""

import os
from typing import Final

__version__: Final = "0.1.0"
__all__ = ["__version__"]

# onnxruntime keeps an identifier of the machine and reports to its maker; the hub's client counts its users. Both read these
# names when they are imported, which is after this package: none of ours imports them at its top, and each imports `fedhlm`.
NO_TELEMETRY: Final = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.update(NO_TELEMETRY)
