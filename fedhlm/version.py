"""The version of fedhlm, in a module that imports nothing but typing."""

from typing import Final

__version__: Final = "0.1.0"
