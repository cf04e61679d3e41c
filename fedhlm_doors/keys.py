"""API keys: who may ask, and how often."""

import hashlib
import hmac
import math
import re
from collections.abc import Callable
from typing import Final

from fedhlm.errors import ConfigError
from fedhlm.process.files import read_secret
from fedhlm.protocol.fields import NAME_PATTERN
from fedhlm_doors.refusals import ApiError

KEY: Final = "api.keys"
ANYONE: Final = "anyone"  # the client where no keys are needed
KEY_LEAST: Final = 16  # characters
BURST_SHARE: Final = 0.25  # of a minute's requests may come at once
_LINE: Final = re.compile(rf"({NAME_PATTERN})[ \t]+(\S{{{KEY_LEAST},}})\Z")


class ApiKeys:
    """The clients by the digests of their keys. Without a file, everybody is the client ANYONE."""

    def __init__(self, names: dict[str, str] | None) -> None:
        self._names = names  # client by SHA-256 (hex) of its key

    @classmethod
    def of(cls, path: str) -> "ApiKeys":
        """Read a file of keys; an empty path means that no key is needed.

        Raises:
            ConfigError: the file cannot be read, others may read it, or a line is not NAME KEY.
        """
        if not path:
            return cls(None)
        lines = read_secret(path, key=KEY).splitlines()
        names: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            found = _LINE.match(line.rstrip())
            if found is None:
                wanted = f"a file of lines NAME KEY, each key of at least {KEY_LEAST} characters"
                raise ConfigError(KEY, path, wanted, why=f"line {number}")
            names[_digest(found[2])] = found[1]
        if not names:
            raise ConfigError(KEY, path, "a file with at least one key")
        return cls(names)

    @property
    def needed(self) -> bool:
        """Whether a client must have a key."""
        return self._names is not None

    def client(self, authorization: str) -> str:
        """The name of the client behind an Authorization header.

        Raises:
            ApiError: a key is needed, and this is none.
        """
        if self._names is None:
            return ANYONE
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest) and scheme.lower() == "bearer":
                return name
        raise ApiError("an API key must be given: Authorization: Bearer KEY", status=401, code="invalid_api_key")


class Rates:
    """A bucket of requests for each client; `per_minute` 0 lets everything through. `clock_s` is monotonic."""

    def __init__(self, per_minute: float, clock_s: Callable[[], float]) -> None:
        self._per_s = per_minute / 60.0
        self._burst = max(1.0, per_minute * BURST_SHARE)
        self._clock_s = clock_s
        self._left: dict[str, tuple[float, float]] = {}  # requests left, and when

    def spend(self, client: str) -> None:
        """Take one request from a client's bucket.

        Raises:
            ApiError: the bucket is empty.
        """
        if not self._per_s:
            return
        now_s = self._clock_s()
        left, then_s = self._left.get(client, (self._burst, now_s))
        left = min(self._burst, left + (now_s - then_s) * self._per_s)
        if left < 1.0:
            wait_s = max(1, math.ceil((1.0 - left) / self._per_s))
            raise ApiError(
                f"{client} asks more often than {60.0 * self._per_s:g} times a minute: wait {wait_s} s",
                status=429,
                code="rate_limit_exceeded",
                retry_s=wait_s,
            )
        self._left[client] = (left - 1.0, now_s)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
