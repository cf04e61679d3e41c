"""The ground floor of fedhlm: messages, topics, buses, sampling, configuration. It imports none of the parts."""

from typing import Final

__version__: Final = "0.1.0"
__all__ = ["__version__"]
