"""Explains settings, sections and presets, for `fedhlm config explain` and for the tables of docs/configuration.md.

`python -m fedhlm.explain docs/configuration.md` rewrites the tables of that page between its marks.
"""

import re
import sys
from collections.abc import Iterator
from typing import Final

from fedhlm.config import (
    DESCRIPTIONS,
    ENV_PREFIX,
    KEYS,
    SECTIONS,
    Loaded,
    default,
    environment_name,
    expectation,
    load,
    near,
    presets,
)
from fedhlm.errors import UnknownKey
from fedhlm.marks import cell, rewrite
from fedhlm.settings import DEFAULT_PRESET, is_secret

CHOICES: Final = ("coupling", "gate", "peers", "threshold", "pipeline.kind")
_NAMED: Final = re.compile(r"`([^`]+)`")
_TWIN: Final = ("edge.upstream", "broker")  # a section, and the section that has the same keys


def explain(loaded: Loaded, name: str = "") -> str:
    """Explain a key, a section or a shipped preset; without a name, list all keys by section.

    Raises:
        UnknownKey: no key, section or preset has this name.
    """
    name = name.removeprefix("--").replace("-", "_") if name.startswith("--") else name
    if name.startswith(ENV_PREFIX):
        name = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
    if name in KEYS:
        return _key(loaded, name)
    if name in SECTIONS:
        return "\n\n".join(_section(section) for section in SECTIONS if f"{section}.".startswith(f"{name}."))
    if name in presets():
        return _preset(name)
    if name:
        raise UnknownKey(name, None, near(name, (*KEYS, *SECTIONS, *presets())))
    return "\n\n".join((_section(""), *map(_section, SECTIONS)))


def related(key: str) -> tuple[str, ...]:
    """Return the keys that a key's description names, and the keys whose descriptions name it."""
    named = set(mentioned(key))
    return tuple(other for other in KEYS if other != key and (other in named or key in mentioned(other)))


def mentioned(key: str) -> tuple[str, ...]:
    """Return the words in backticks of a key's description as full keys. Keys of its own section have short names."""
    section = key.rpartition(".")[0]
    words = (word for word in _NAMED.findall(DESCRIPTIONS[key]))
    return tuple(next((found for found in (f"{section}.{word}", word) if found in KEYS), word) for word in words)


def tables() -> dict[str, str]:
    """Return the generated parts of docs/configuration.md, by the name of their marks."""
    keys = "\n\n".join(_table(section) for section in ("", *SECTIONS) if _own(section))
    return {"settings": keys, "presets": "\n".join(_preset_rows())}


def _own(section: str) -> tuple[str, ...]:
    return tuple(key for key in KEYS if key.rpartition(".")[0] == section)


def _plain(description: str) -> str:
    return description.replace("`", "")


def _key(loaded: Loaded, key: str) -> str:
    section, _, name = key.rpartition(".")
    value, source = next((value, source) for known, value, source in loaded.rows() if known == key)
    flag = () if is_secret(key) else (f"--{key}",)
    facts = {
        "value": f"{value} ({source})" if source != "default" else f"{value} (the default)",
        "default": default(key),
        "must be": expectation(key),
        "set by": ", ".join(
            (f"{name} in [{section}] of a file" if section else f"{name} in a file", environment_name(key), *flag)
        ),
        "related": ", ".join(related(key)),
    }
    lines = (f"  {label:<8}  {fact}" for label, fact in facts.items() if fact)
    return "\n".join((f"{key}: {_plain(DESCRIPTIONS[key])}", *lines))


def _section(section: str) -> str:
    keys = _own(section)
    width = max((len(key) for key in keys), default=0)
    heading = f"{section}: {_plain(DESCRIPTIONS[section])}\n" if section else ""
    return heading + "\n".join(f"  {key:<{width}}  {_plain(DESCRIPTIONS[key])}" for key in keys)


def _preset(name: str) -> str:
    loaded = load(preset=name, environ={})
    own = [(key, value) for key, value, source in loaded.rows() if source == f"preset {name}"]
    width = max(len(key) for key, _ in own)
    return "\n".join((f"preset {name}: {presets()[name]}", *(f"  {key:<{width}}  {value}" for key, value in own)))


def _table(section: str) -> str:
    heading = f"### `{section}`\n\n{DESCRIPTIONS[section]}\n\n" if section else ""
    if section == _TWIN[0]:
        return f"{heading}The keys of `{_TWIN[1]}`, for the broker on the side of the cloud."
    rows = (
        f"| `{key.rpartition('.')[2]}` | {cell(expectation(key))} | `{default(key)}` | {cell(DESCRIPTIONS[key])} |"
        for key in _own(section)
    )
    return "\n".join((f"{heading}| key | must be | default | what it does |", "|---|---|---|---|", *rows))


def _preset_rows() -> Iterator[str]:
    yield f"| preset | promise | {' | '.join(f'`{choice}`' for choice in CHOICES)} |"
    yield "|---" * (2 + len(CHOICES)) + "|"
    for name, promise in presets().items():
        chosen = {key: value for key, value, _ in load(preset=name, environ={}).rows()}
        cells = " | ".join(str(chosen[f"generation.{choice}"]).strip('"') for choice in CHOICES)
        yield f"| `{name}`{' (default)' if name == DEFAULT_PRESET else ''} | {cell(promise)} | {cells} |"


if __name__ == "__main__":
    rewrite(sys.argv[1:], tables())
