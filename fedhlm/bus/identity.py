"""MQTT client ids. Two connections with the same id disconnect each other, so each of ours needs its own."""

import hashlib
from typing import Final
from urllib.parse import quote

# The longest id that all common brokers accept (AWS IoT Core and Azure Event Grid: 128 bytes).
MAX_ID_BYTES: Final = 128


def client_id(kind: str, *names: str, root: str) -> str:
    """Return the id of one connection, made of its kind, the names of its owner, and the root of its topics.

    Different arguments give different ids, because names hold no colon and each kind has a fixed number of names. An id
    holds no `+`, `#` or `/`, which some brokers reject. One above MAX_ID_BYTES is replaced by its SHA-256 digest.
    """
    full = ":".join((kind, *names, quote(root, safe="")))
    if len(full) <= MAX_ID_BYTES:
        return full
    return f"{kind}::{hashlib.sha256(full.encode()).hexdigest()}"
