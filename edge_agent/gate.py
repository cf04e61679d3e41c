"""Who settles a drafted token: True sends it up, False keeps it on the device."""

from collections.abc import Callable
from typing import Final

Gate = Callable[[float], bool]
"""From the uncertainty of a draft, in [0, 1], to whether it must be settled elsewhere."""


def always(_uncertainty: float) -> bool:
    """Every token is verified."""
    return True


def never(_uncertainty: float) -> bool:
    """No token is verified."""
    return False


GATES: Final[dict[str, Gate]] = {"always": always, "never": never}
