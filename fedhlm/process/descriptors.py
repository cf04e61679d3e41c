"""How many connections this process may have open at once."""

import resource
from typing import Final

# asyncio accepts so many connections in one turn of its loop, and tells us of them two turns later: up to three times
# as many are open without our knowledge, whatever queue the system keeps in front of them.
ACCEPTED_AT_ONCE: Final = 16
# Connections that the system keeps until they are accepted. asyncio sets its own number when it begins to listen, so
# this one must be set afterwards.
BACKLOG: Final = 512
# For files and our own links, and for connections that we do not know of yet.
SPARE: Final = 128


def room_for(connections: int) -> int:
    """Raise the soft limit of open files where that makes room for so many connections; return how many have room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(connections, soft - SPARE))
