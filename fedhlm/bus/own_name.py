"""The name by which a broker knows us: the user name, or the common name of our certificate."""

import re
import ssl
from typing import Any

from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.protocol.fields import NAME_PATTERN


def own_name(address: BrokerUrl) -> str | None:
    """Return the name that access rules use for us; None if there is none, or if it is no valid party name.

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
        except ssl.SSLError:  # the broker will reject it, with a reason
            facts = None
        name = common_name(facts) if facts else name
    return name if name is not None and re.fullmatch(NAME_PATTERN, name) else None


def common_name(facts: dict[str, Any]) -> str | None:
    """Return the common name in the facts that `ssl` gives about a certificate; None if there is none."""
    return next((value for part in facts["subject"] for field, value in part if field == "commonName"), None)


def shown(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any] | None:
    """Return the facts that a server sees of the client's certificate, by a handshake in memory.

    The result is None if the server does not ask for a certificate.

    Raises:
        ssl.SSLError: the server would reject the certificate.
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
