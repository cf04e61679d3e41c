"""The data of the checks: their input, their results and their description.

A check returns ok(), warn(), fail() or skip().
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from fedhlm.config import Loaded
from fedhlm.errors import ConfigError
from fedhlm.protocol.messages import Fingerprint
from fedhlm.protocol.roles import ROLES, PartRole, RoleTraits
from fedhlm.settings import Config

if TYPE_CHECKING:
    from fedhlm.decoding.decoder import ModelInfo
    from fedhlm_fleet.doctor.probe import Probe

Level = Literal["ok", "warn", "fail", "skip"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check. `advice` says what to do, and may be empty; `seconds` is how long the check took."""

    name: str
    level: Level
    found: str
    advice: str = ""
    seconds: float = 0.0


class Remark(NamedTuple):
    """A finding without the name of its check."""

    level: Level
    found: str
    advice: str = ""


def ok(found: str) -> Remark:
    """Report that all is well."""
    return Remark("ok", found)


def warn(found: str, advice: str) -> Remark:
    """Report something that works, but could be better or will fail later."""
    return Remark("warn", found, advice)


def fail(found: str, advice: str) -> Remark:
    """Report that the part cannot work, or not as it should."""
    return Remark("fail", found, advice)


def skip(found: str) -> Remark:
    """Report that something was not checked, and why."""
    return Remark("skip", found)


class CheckedModel(NamedTuple):
    """The part's checked model folder. `space` names the space of its context keys, empty without a projection.

    `info` is None for a model on a server, of which the folder has the tokenizer only.
    """

    folder: Path
    info: "ModelInfo | None"
    fingerprint: Fingerprint
    space: str


@dataclass
class Subject:
    """The part to check and its environment; checks store here what later ones need.

    `requires` returns the requirements of fedhlm, `version` the installed version of a distribution. `proc` and
    `cgroup` are the kernel's folders.
    """

    role: PartRole
    loaded: Loaded | None
    problem: ConfigError | None = None
    requires: Callable[[], list[str]] = lambda: metadata.requires("fedhlm") or []
    version: Callable[[str], str] = metadata.version
    machine: str = field(default_factory=platform.machine)
    wall_s: Callable[[], float] = time.time
    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")
    user_id: int = field(default_factory=os.getuid)
    model: CheckedModel | None = None
    probes: dict[str, "Probe"] = field(default_factory=dict)  # open sessions by the broker's key

    @property
    def config(self) -> Config:
        """The configuration; a check that uses it must need the check `configuration`."""
        if self.loaded is None:
            raise self.problem or AssertionError("neither a configuration nor its error")
        return self.loaded.config

    @property
    def sources(self) -> dict[str, str]:
        """The source of each configuration key."""
        return {} if self.loaded is None else self.loaded.sources

    @property
    def traits(self) -> RoleTraits:
        """The properties of the part's role."""
        return ROLES[self.role]

    @property
    def name(self) -> str:
        """The part's name on the bus."""
        if self.loaded is None:
            return self.role
        names = {"agent": self.config.agent.id, "edge": f"edge-{self.config.cluster.name}", "cloud": "cloud"}
        return names[self.role]

    def close(self) -> None:
        """Close all sessions."""
        for probe in self.probes.values():
            probe.close()
        self.probes.clear()


class Check(NamedTuple):
    """A check; it runs if all of `needs` ended with ok or warn, and has `deadline_s` seconds."""

    name: str
    run: Callable[[Subject], Remark]
    needs: tuple[str, ...] = ()
    deadline_s: float = 2.0
