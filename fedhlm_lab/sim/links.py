"""Link profiles as small TOML files: the shipped ones in `fedhlm_lab/sim/links`, or the user's own.

A profile holds one-way delay and jitter in milliseconds, rates in bytes per second, and the share of packets that the
transport sends again. A file that cannot be used raises ConfigError with key, value and expectation.
"""

import difflib
import math
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from fedhlm.errors import ConfigError, UnknownKey
from fedhlm_lab.sim.link import LinkModel

MESSAGE_BYTES: Final = 250  # an ordinary escalation or verdict with its topic's name
RESEND_MIN_S: Final = 0.2  # the smallest retransmission timeout of common TCP stacks


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One client's link to its broker; the shipped files give the sources of their figures."""

    delay_ms: Annotated[float, Meta(ge=0.0, le=60_000.0)] = 0.0
    jitter_ms: Annotated[float, Meta(ge=0.0, le=60_000.0)] = 0.0
    up_bytes_per_s: Annotated[float, Meta(ge=1.0, le=1e12)] | None = None
    down_bytes_per_s: Annotated[float, Meta(ge=1.0, le=1e12)] | None = None
    resent: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.0

    @property
    def round_trip_s(self) -> float:
        """Round trip of two ordinary messages with the largest jitter, in seconds."""
        waiting_s = sum(
            MESSAGE_BYTES / rate for rate in (self.up_bytes_per_s, self.down_bytes_per_s) if rate is not None
        )
        return 2.0 * (self.delay_ms + self.jitter_ms) / 1000.0 + waiting_s

    def apply(self, link: LinkModel) -> None:
        """Give a link this profile, without faults."""
        link.delay_s, link.jitter_s = self.delay_ms / 1000.0, self.jitter_ms / 1000.0
        link.up_bytes_per_s, link.down_bytes_per_s = self.up_bytes_per_s, self.down_bytes_per_s
        link.resent, link.resend_s = self.resent, max(RESEND_MIN_S, self.round_trip_s)
        link.loss = link.duplicate = link.reorder = 0.0


_EXPECTED: Final = {
    "delay_ms": "milliseconds from 0 to 60000",
    "jitter_ms": "milliseconds from 0 to 60000",
    "up_bytes_per_s": "bytes per second from 1 to 1e12",
    "down_bytes_per_s": "bytes per second from 1 to 1e12",
    "resent": "a share from 0 to 0.9",
}


def names() -> tuple[str, ...]:
    """Names of the shipped profiles."""
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.is_file()))


def load(wanted: str, *, key: str = "--link") -> LinkProfile:
    """Load a shipped profile by name, or the profile in a .toml file.

    Raises:
        ConfigError: an unknown name, a file that cannot be read, an unknown key or a bad value; `key` names the option.
    """
    if not wanted.endswith(".toml"):
        if wanted not in names():
            near = difflib.get_close_matches(wanted, names(), n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(key, wanted, f"one of {', '.join(names())} or a .toml file{hint}")
        return _parse(_folder().joinpath(f"{wanted}.toml").read_text("utf-8"), wanted)
    try:
        text = Path(wanted).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(key, wanted, "a readable UTF-8 TOML file", why=str(exc)) from exc
    return _parse(text, wanted)


def _folder() -> Any:
    return resources.files("fedhlm_lab.sim").joinpath("links")


def _parse(text: str, source: str) -> LinkProfile:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError("link", source, "a TOML file", why=str(exc)) from exc
    for name, value in table.items():
        if name not in _EXPECTED:
            near = difflib.get_close_matches(name, _EXPECTED, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(_EXPECTED)}"
            raise UnknownKey(f"link.{name}", value, hint, source=f"file {source}")
        try:
            msgspec.convert({name: value}, LinkProfile)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"link.{name}", value, _EXPECTED[name], source=f"file {source}") from exc
        if not math.isfinite(value):
            raise ConfigError(f"link.{name}", value, _EXPECTED[name], source=f"file {source}")
    return msgspec.convert(table, LinkProfile)
