"""The address of a broker and our credentials: `mqtt://[user:password@]host[:port]` or `mqtts://...`.

TLS files are given in the query (`mqtts://host?ca=ca.pem&cert=me.pem&key=me.key`) or passed beside the URL.
The password appears in no repr, no log line and no error message.
"""

import re
import ssl
from typing import Final, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from fedhlm.errors import ConfigError

_PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
# What each TLS alert of a broker means for the client that it rejects.
_ALERTS: Final = {
    "certificate required": "asks for our certificate: set cert and key",
    "certificate revoked": "refused our certificate: it has been revoked",
    "certificate expired": "refused our certificate: it, its CA or the broker's revocation list has expired",
    "unknown ca": "refused our certificate: another CA made it, or the broker has no revocation list of its CA",
    "bad certificate": "refused our certificate: bad, not valid yet, or the broker's revocation list is not",
    "unsupported certificate": "refused our certificate: it was made for another purpose",
    "certificate unknown": "refused our certificate",
}
_ALERT: Final = re.compile(rf"alert ({'|'.join(_ALERTS)})\b")
_DISTRUST: Final = re.compile(r"certificate verify failed: (.+?)(?: \(_ssl|$)")
# The clock of a device that has just started may be wrong, so this error may pass.
_PASSING: Final = "not yet valid"
HOST_MAX: Final = 253  # characters of a DNS name
_EXPECTED: Final = "mqtt://[user:password@]host[:port] or mqtts://..."


class TlsFiles(NamedTuple):
    """Paths of PEM files: the CA of the broker (None: the system's CAs), our certificate, and its key."""

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


class BrokerUrl(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed broker address. `str()` returns it without user and password."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = None
    files: TlsFiles = TlsFiles()

    @classmethod
    def parse(cls, text: str, *, files: TlsFiles | None = None, key: str = "broker.url") -> Self:
        """Parse a URL. `files` overrides the query; `key` is the name of the setting in errors.

        Raises:
            ConfigError: another scheme, no host, a bad port, unknown query keys, TLS files without TLS.
        """
        try:
            return cls._parsed(text, files, key)
        except ConfigError as exc:
            # Such a character ends the address too early, and the text after it may be part of the password.
            if re.search(r"[/?#\[\]]", text.partition("://")[2].rpartition("@")[0]):
                wanted = (
                    f"{_EXPECTED}, with /, ?, #, [ and ] in user and password percent-encoded (%2F, %3F, %23, %5B, %5D)"
                )
                raise ConfigError(key, exc.value, wanted) from None
            raise

    @classmethod
    def _parsed(cls, text: str, files: TlsFiles | None, key: str) -> Self:
        shown = _without_secrets(text)
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:  # its own message may contain the password
            raise ConfigError(key, shown, f"{_EXPECTED}, the port an integer in 1..65535") from None
        if parts.scheme not in _PORTS or not parts.hostname or port == 0:
            raise ConfigError(key, shown, _EXPECTED)
        if not _can_be_looked_up(parts.hostname):
            raise ConfigError(key, shown, f"{_EXPECTED}, the host a name or an address")
        if parts.path not in ("", "/") or parts.fragment:
            raise ConfigError(key, shown, f"{_EXPECTED}, without a path")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        unknown = sorted(set(query) - {"ca", "cert", "key"})
        if unknown:
            raise ConfigError(
                key, shown, f"an address with the query keys ca, cert and key only, without {unknown[0]!r}"
            )
        files = files or TlsFiles(query.get("ca"), query.get("cert"), query.get("key"))
        if parts.scheme == "mqtt" and files != TlsFiles():
            raise ConfigError(key, shown, "an mqtts:// address, since certificates are given")
        if (files.cert is None) != (files.key is None):
            raise ConfigError(key, shown, "given cert and key together")
        return cls(
            host=unquote(parts.hostname),  # RFC 6874: the zone of fe80::1%25eth0
            port=port or _PORTS[parts.scheme],
            tls=parts.scheme == "mqtts",
            username=None if parts.username is None else unquote(parts.username),
            password=None if parts.password is None else unquote(parts.password),
            files=files,
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def __repr__(self) -> str:
        return f"BrokerUrl({str(self)!r})"

    def ssl_context(self, *, key: str = "broker.url") -> ssl.SSLContext | None:
        """Read the TLS files and return the TLS settings; None without TLS.

        Raises:
            ConfigError: a file is missing or is not a certificate or key.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.files.ca)
        except (OSError, ValueError) as exc:  # a name with a zero byte is a ValueError
            raise ConfigError(f"{key} (ca)", self.files.ca, "a readable PEM file", why=_reason(exc)) from exc
        context.sslsocket_class = _ClosingSocket
        if self.files.cert is not None:
            try:
                context.load_cert_chain(self.files.cert, self.files.key)
            except (OSError, ValueError) as exc:
                found = f"{self.files.cert}, {self.files.key}"
                raise ConfigError(f"{key} (cert, key)", found, "a PEM pair", why=_reason(exc)) from exc
        return context


def _can_be_looked_up(host: str) -> bool:
    """Whether a resolver takes the name of a host; others make it fail with an error that is no OSError."""
    if len(host) > HOST_MAX:  # and the encoding takes microseconds a character
        return False
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return host.isprintable() and " " not in host


def tls_refusal(error: str) -> str | None:
    """Describe a certificate error, as a predicate that follows "broker URL"; None when a later attempt may succeed."""
    if (alert := _ALERT.search(error)) is not None:
        return _ALERTS[alert[1]]
    if (distrust := _DISTRUST.search(error)) is not None and _PASSING not in distrust[1]:
        return f"cannot be trusted: {distrust[1]}"
    return None


class _ClosingSocket(ssl.SSLSocket):
    """A socket that closes itself when the handshake fails. paho would leave it to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def _without_secrets(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else text.rpartition("@")[2]


def _reason(exc: Exception) -> str:
    return getattr(exc, "strerror", None) or str(exc)
