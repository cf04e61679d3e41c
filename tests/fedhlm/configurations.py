"""The shipped presets, and configurations that cannot be read."""

from typing import Any

import pytest

from fedhlm.config import load
from fedhlm.errors import ConfigError

MODES = {
    "exact": ("gumbel", "always", "async"),
    "hlm": ("full", "always", "blocking"),
    "slm-only": ("gumbel", "never", "blocking"),
    "budget": ("gumbel", "threshold", "blocking"),
    "fedhlm": ("greedy", "threshold", "blocking"),
    "cu-hlm": ("published-cu", "threshold", "blocking"),
    "speculative": ("lattice", "always", "blocking"),
    "u-hlm": ("full", "threshold", "blocking"),
    "rand-hlm": ("full", "random", "blocking"),
    "llm-only": ("gumbel", "always", "remote"),
    "colocated": ("gumbel", "always", "remote"),
}


def error_of(**sources: Any) -> ConfigError:
    sources.setdefault("environ", {})
    with pytest.raises(ConfigError) as caught:
        load(**sources)
    return caught.value
