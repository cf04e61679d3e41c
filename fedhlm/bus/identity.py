"""MQTT client ids. Two connections of one id throw each other out, so no two of ours may have the same."""

import hashlib
from typing import Final
from urllib.parse import quote

# Some brokers take no longer ones (AWS IoT Core and Azure Event Grid: 128 bytes).
MAX_ID_BYTES: Final = 128


def client_id(kind: str, *names: str, root: str) -> str:
    """The id of one connection: what it is, the names of whom it speaks for, and the root of its topics.

    Different arguments give different ids. Names hold no colon, and each kind has its own number of them. Without `+`, `#`
    and `/`, which brokers that put ids into access rules refuse. A longer one than MAX_ID_BYTES becomes a digest of itself.
    """
    full = ":".join((kind, *names, quote(root, safe="")))
    if len(full) <= MAX_ID_BYTES:
        return full
    return f"{kind}::{hashlib.sha256(full.encode()).hexdigest()}"
