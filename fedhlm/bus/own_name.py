"""What a broker calls us: the user's name, or the common name of our certificate."""

import re
import ssl
from typing import Any

from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.protocol.messages import NAME_PATTERN


def own_name(address: BrokerUrl) -> str | None:
    """The name that access rules know us by; None where there is none, or none that a party can have.

    Raises:
        ConfigError: a certificate file cannot be used.
    """
    name = address.username
    if address.files.cert is not None and address.files.ca is not None:
        context = address.ssl_context()
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(address.files.cert, address.files.key)
        server.load_verify_locations(address.files.ca)
        server.verify_mode = ssl.CERT_REQUIRED
        try:
            facts = None if context is None else shown(server, context)
        except ssl.SSLError:  # the broker will refuse it, and say why
            facts = None
        name = common_name(facts) if facts else name
    return name if name is not None and re.fullmatch(NAME_PATTERN, name) else None


def common_name(facts: dict[str, Any]) -> str | None:
    """The common name in what `ssl` tells of a certificate."""
    return next((value for part in facts["subject"] for field, value in part if field == "commonName"), None)


def shown(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any] | None:
    """What a server of our own is shown of the client's certificate: a handshake in memory. None where it does not look.

    Raises:
        ssl.SSLError: the certificate would be refused.
    """
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for end in (*ends, *ends):  # hello, hello and certificate, certificate, done
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return ends[1].getpeercert() or None
