"""TLS checks: of the broker's certificate by a handshake with it, of our own certificate by a handshake in memory."""

import socket
import ssl
import time
from typing import Any, Final

from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.bus.own_name import common_name, shown
from fedhlm_fleet.doctor.finding import Remark, fail, ok, skip, warn

WARN_DAYS: Final = 30
ALERT_S: Final = 0.3  # a broker that rejects our certificate sends its alert after the handshake
# Advice for some of OpenSSL's X509_V_ERR numbers.
ADVICE: Final = {
    9: "it is not valid yet: set this machine's clock (timedatectl)",
    10: "it has expired: renew the broker's certificate and restart the broker; is this machine's clock right?",
    18: "the broker's certificate is self-signed: set {key}.ca to the authority's ca.crt",
    19: "another authority signed it: give {key}.ca the ca.crt of the authority that issued the broker's certificate",
    20: "another authority signed it: give {key}.ca the ca.crt of the authority that issued the broker's certificate",
    62: "connect by a name that is in the certificate, or issue it with --dns {host}",
    64: "connect by an address that is in the certificate, or issue it with --dns {host}",
}


def broker_certificate(address: BrokerUrl, key: str, *, timeout_s: float, now_s: float) -> Remark:
    """Do a TLS handshake with the broker, and check the dates of its certificate.

    Raises:
        ConfigError: a certificate file cannot be used.
    """
    context = address.ssl_context(key=f"{key}.url")
    if context is None:
        if address.host in ("localhost", "127.0.0.1", "::1"):
            return ok("no TLS, and none needed on this machine")
        return warn(
            "no TLS: others on the network can read texts and passwords",
            f"give the broker a certificate, and {key}.url mqtts://",
        )
    try:
        with (
            socket.create_connection((address.host, address.port), timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as secure,
        ):
            facts: dict[str, Any] = secure.getpeercert() or {}
            version = secure.version()
            secure.settimeout(ALERT_S)
            try:
                if secure.recv(1) == b"":
                    return fail(
                        "the broker hangs up after the handshake",
                        f"it may want a certificate: set {key}.cert and {key}.key",
                    )
            except TimeoutError:
                pass  # a broker sends nothing before it gets a request
    except ssl.SSLCertVerificationError as exc:
        advice = ADVICE.get(exc.verify_code, "renew the broker's certificate")
        return fail(
            f"the broker's certificate is refused: {exc.verify_message}", advice.format(key=key, host=address.host)
        )
    except ssl.SSLError as exc:
        return fail(
            f"the broker ends the handshake: {exc.reason or exc}",
            f"renew our certificate and set {key}.cert and {key}.key; is the port one with TLS?",
        )
    except OSError as exc:
        return fail(f"the connection broke: {exc.strerror or exc}", "is the port one with TLS?")
    return _dates(facts, now_s, f"{version}, the broker's certificate", "renew the broker's certificate")


def own_certificate(address: BrokerUrl, key: str, *, now_s: float) -> Remark:
    """Check our certificate as a broker would: its key, its chain and its dates.

    Raises:
        ConfigError: a certificate file cannot be used.
    """
    files = address.files
    context = address.ssl_context(key=f"{key}.url")
    if context is None or files.cert is None:
        return skip("no certificate of our own is set")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.cert, files.key)
    if files.ca is not None:
        server.load_verify_locations(files.ca)
    server.verify_mode = ssl.CERT_REQUIRED if files.ca is not None else ssl.CERT_NONE
    # The server side uses the same certificate, which is not issued for servers; only the client's certificate is
    # checked.
    try:
        facts = shown(server, context)
    except ssl.SSLCertVerificationError as exc:
        advice = f"renew it: fedhlm pki issue, then put the files where {key}.cert and {key}.key point"
        return fail(f"our certificate would be refused: {exc.verify_message}", advice)
    if facts is None:
        return ok("our certificate and key belong together; without an authority its dates cannot be checked")
    name = common_name(facts) or "nameless"
    return _dates(facts, now_s, f"our certificate ({name})", "renew it in time: fedhlm pki issue")


def _dates(facts: dict[str, Any], now_s: float, what: str, advice: str) -> Remark:
    ends_s = ssl.cert_time_to_seconds(facts["notAfter"])
    days = int((ends_s - now_s) // 86_400)
    found = f"{what} is valid until {time.strftime('%Y-%m-%d', time.gmtime(ends_s))} ({days} days)"
    return warn(found, advice) if days < WARN_DAYS else ok(found)
