"""The presence of a client's connection: agents end its requests when the broker publishes its last will."""

import random

from fedhlm.bus.interface import Retained
from fedhlm.bus.party import Stamp, presence
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode


def birth_and_will(stamp: Stamp, connection: str, root: str) -> tuple[Retained, Retained]:
    """The birth message and the last will of a client's connection."""
    name = topics.CLIENT_STATUS.name(root, client=stamp.sender)
    birth, will = (encode(presence(stamp, "client", online=online, connection=connection)) for online in (True, False))
    return Retained(name, birth), Retained(name, will)


def new_number() -> str:
    """A number by which one connection of a client differs from all others, in hexadecimal."""
    return f"{random.SystemRandom().getrandbits(40):010x}"
