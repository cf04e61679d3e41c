"""`fedhlm doctor`: check a part on the machine on which it runs."""

import difflib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fedhlm.errors import ConfigError, FedhlmError
from fedhlm_fleet.commands.common import Keys, parse_keys

if TYPE_CHECKING:
    from fedhlm.protocol.roles import PartRole
    from fedhlm_fleet.doctor.finding import Subject


def doctor(*words: Keys, config: Path | None = None, preset: str | None = None, json: bool = False) -> int:
    """Check an agent, an edge or a cloud on this machine: fedhlm doctor edge --config edge.toml.

    Without a role, check an agent. Every configuration key is also a flag.
    Exit code 0: no check failed; 1: a check failed.

    Parameters
    ----------
    config
        TOML file of the part.
    preset
        Name of a shipped preset, or path of a preset file.
    json
        Print one JSON object instead of text.
    """
    from rich.console import Console

    from fedhlm.protocol.roles import PARTS
    from fedhlm_fleet.doctor.checks import checks_of
    from fedhlm_fleet.doctor.report import as_json, failed, show, summary
    from fedhlm_fleet.doctor.runner import examine, leave

    given, *rest = words if words and not words[0].startswith("--") else ("agent", *words)
    role = next((role for role in PARTS if role == given), None)
    if role is None:
        near = difflib.get_close_matches(given, PARTS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise FedhlmError(f"ROLE must be one of {', '.join(PARTS)}{hint} (got {given!r})")
    subject = _subject(role, config, preset, parse_keys(rest))
    begun_s = time.monotonic()
    console = Console(highlight=False, soft_wrap=False)
    if not json:
        console.print(f"fedhlm doctor: {role} {subject.name}\n", markup=False)
    findings = []
    try:
        for finding in examine(checks_of(subject), subject):
            findings.append(finding)
            if not json:
                show(finding, console)
    finally:
        subject.close()
    seconds = time.monotonic() - begun_s
    if json:
        print(as_json(subject, findings, seconds))
    else:
        console.print(f"\n{summary(findings)} ({seconds:.1f} s)", markup=False)
    return leave(1 if failed(findings) else 0)


def _subject(role: "PartRole", file: Path | None, preset: str | None, flags: dict[str, str]) -> "Subject":
    """Return the part to check. An invalid configuration file becomes a finding, an invalid flag an error."""
    from fedhlm.config import load
    from fedhlm_fleet.doctor.finding import Subject

    try:
        return Subject(role, load(file=file, preset=preset, flags=flags))
    except ConfigError as exc:
        if exc.source.startswith("flag --"):
            raise
        return Subject(role, None, problem=exc)
