"""Changes of important rules, each of which must turn at least one test of its room red (`python -m tests.mutants.run`).

What stands here was once let through by all tests, or came with a rule.
"""

from typing import Final

from tests.mutants.change import Change
from tests.mutants.of_devices import OF_DEVICES
from tests.mutants.of_fleets import OF_FLEETS

CHANGES: Final[tuple[Change, ...]] = (*OF_DEVICES, *OF_FLEETS)
