"""Merges the configuration and records the source of each value: defaults < preset < TOML file < environment < flags.

A key is dotted (`generation.pipeline.block`). Its environment variable is FEDHLM_ with `__` for the dot
(FEDHLM_GENERATION__PIPELINE__BLOCK). A value that cannot be used raises ConfigError, which names key, value,
expectation and source.
"""

import difflib
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from fedhlm import choices
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.important import PATTERN, RULES, rules_of
from fedhlm.errors import ConfigError, UnknownKey
from fedhlm.learning.certificate import AUDIT_LEAST
from fedhlm.settings import DEFAULT_PRESET, Broker, Config, Section, is_secret, masked

ENV_PREFIX: Final = "FEDHLM_"
# Variables of the model tools, which have no configuration file.
OTHER_VARIABLES: Final = frozenset({"FEDHLM_DATA"})
PRESET_FOLDER: Final = Path(__file__).with_name("presets")


class Setting(NamedTuple):
    """A value and its source."""

    value: object
    source: str


Layer = dict[str, Setting]


@dataclass(frozen=True)
class Loaded:
    """A merged configuration and the source of every key. The layers are kept, so that the preset can be exchanged."""

    config: Config
    sources: dict[str, str]
    _layers: tuple[Layer, ...] = field(repr=False)
    _chosen: "dict[str, Loaded]" = field(
        default_factory=dict, repr=False, compare=False
    )  # by preset that was asked for

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (key, value as TOML with secrets masked, source) of each key, in the order of declaration."""
        return [(key, _shown(key, _lookup(self.config, key)), self.sources[key]) for key in KEYS]

    def with_preset(self, name: str) -> "Loaded":
        """Merge the same file, environment and flags over another shipped preset.

        Raises:
            ConfigError: no shipped preset has this name. A path is rejected, because the name may come from the bus.
        """
        if name not in presets():
            raise _unknown_preset(name, "request", "")
        chosen: Layer = {"preset": Setting(name, "request")}
        return _merge(_read_preset(name, "request"), *self._layers[1:], chosen)

    def asked(self, name: str | None) -> "Loaded":
        """The settings for a prompt that names this preset; None: the agent's own.

        Raises:
            ConfigError: there is no such preset, or `agent.presets` does not allow prompts to name it.
        """
        if name is None or name == self.config.preset:
            return self
        if (known := self._chosen.get(name)) is not None:
            return known
        chosen = self.with_preset(name)
        if name not in self.allowed:
            wanted = f"one that this agent allows: {', '.join(self.allowed)}"
            raise _error("preset", name, wanted, "request")
        self._chosen[name] = chosen
        return chosen

    @cached_property
    def allowed(self) -> tuple[str, ...]:
        """The presets that prompts may name: the agent's own, then those of `agent.presets`.

        Without such a list these are all that let the text go no farther than the agent's own settings do.
        """
        own = self.config.preset
        listed = self.config.agent.presets or tuple(name for name in presets() if self._goes_no_farther(name))
        return tuple(dict.fromkeys((own, *listed)))

    def _goes_no_farther(self, name: str) -> bool:
        try:
            return _reach(self.with_preset(name).config) <= _reach(self.config)
        except ConfigError:  # it contradicts what file, environment or flags set
            return False


def load(
    *,
    file: str | Path | None = None,
    preset: str | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Loaded:
    """Merge all sources. `flags` maps dotted keys to text. `preset` is the same as the flag of that name.

    `environ` defaults to the environment of the process.

    Raises:
        ConfigError: a file cannot be read, a key or preset is unknown, a value is out of range, or values contradict
            each other.
    """
    given = dict(flags or {}) if preset is None else {**(flags or {}), "preset": preset}
    layers = (
        _read_file(Path(file)) if file is not None else {},
        _read_environment(os.environ if environ is None else environ),
        _read_flags(given),
    )
    wanted = Setting(DEFAULT_PRESET, "default")
    for layer in layers:
        wanted = layer.get("preset", wanted)
    return _merge(_read_preset(str(wanted.value), wanted.source), *layers)


def presets() -> dict[str, str]:
    """Return the promise of each shipped preset, by name."""
    return {path.stem: _read_shipped(path)["promise"] for path in sorted(PRESET_FOLDER.glob("*.toml"))}


def environment_name(key: str) -> str:
    """Return the environment variable of a dotted key."""
    return ENV_PREFIX + key.upper().replace(".", "__")


def check(loaded: Loaded) -> str:
    """Return the merged configuration as an aligned table of key, value and source."""
    rows = [("key", "value", "source"), *loaded.rows()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}" for key, value, source in rows)


def _walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in msgspec.structs.fields(section):
        key = prefix + entry.name
        if isinstance(entry.type, type) and issubclass(entry.type, Section):
            yield key, entry.type
            yield from _walk(entry.type, f"{key}.")
        else:
            yield key, entry.type


def _description(kind: Any) -> str:
    if isinstance(kind, type):
        return " ".join((kind.__doc__ or "").split())
    return next((meta.description for meta in reversed(kind.__metadata__) if meta.description), "")


_TYPES: Final[dict[str, Any]] = dict(_walk(Config))
# The description of every section and key, in the order of declaration.
DESCRIPTIONS: Final[dict[str, str]] = {key: _description(kind) for key, kind in _TYPES.items()}
SECTIONS: Final = tuple(key for key, kind in _TYPES.items() if isinstance(kind, type) and issubclass(kind, Section))
KEYS: Final = tuple(key for key in _TYPES if key not in SECTIONS)


def _merge(*layers: Layer) -> Loaded:
    settings = {key: Setting(_lookup(_DEFAULTS, key), "default") for key in KEYS}
    for layer in layers:
        settings.update(layer)
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        *path, name = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[name] = setting.value
    config = msgspec.convert(tree, Config)
    sources = {key: settings[key].source for key in KEYS}
    _check_together(config, sources)
    return Loaded(config, sources, layers)


def _read_file(path: Path) -> Layer:
    return _layer(_flat(read_toml(path), f"file {path}"), lambda _: f"file {path}")


def _read_preset(wanted: str, source: str) -> Layer:
    is_path = wanted.endswith(".toml") or "/" in wanted or os.sep in wanted
    path = Path(wanted) if is_path else PRESET_FOLDER / f"{wanted}.toml"
    if not is_path and wanted not in presets():
        raise _unknown_preset(wanted, source, " or a path to a .toml file")
    table = dict(read_toml(path) if is_path else _read_shipped(path))
    promise = table.pop("promise", None)
    if not isinstance(promise, str) or not promise:
        raise ConfigError(
            "promise", promise, "one line of text that states what the preset does", source=f"file {path}"
        )
    flat = _flat(table, f"preset {wanted}")
    for key, value in flat.items():
        if not key.startswith("generation."):
            raise _error(key, value, "left out, since a preset sets generation keys only", f"preset {wanted}")
    return _layer(flat, lambda _: f"preset {wanted}")


def _read_environment(environ: Mapping[str, str]) -> Layer:
    named = {
        name.removeprefix(ENV_PREFIX).lower().replace("__", "."): (name, value)
        for name, value in sorted(environ.items())
        if name.startswith(ENV_PREFIX) and name not in OTHER_VARIABLES
    }
    for key, (name, value) in named.items():
        _require_known(key, value, f"env {name}", environment_name)
    return _layer({key: value for key, (_, value) in named.items()}, lambda key: f"env {named[key][0]}", text=True)


def _read_flags(flags: Mapping[str, str]) -> Layer:
    for key, value in flags.items():
        _require_known(key, value, f"flag --{key}")
        if is_secret(key):
            raise _secret_on_command_line(key, value)
    return _layer(flags, lambda key: f"flag --{key}", text=True)


def read_toml(path: Path, *, key: str = "file") -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: it cannot be read, or is none; `key` is what named it.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise ConfigError(key, str(path), "a readable TOML file", why=exc.strerror or str(exc)) from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(key, str(path), "TOML", why=str(exc)) from exc


_read_shipped = cache(read_toml)
"""Shipped presets are read once, since every prompt that names one asks for it. Its tables are not modified."""


def _flat(table: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in table.items():
        key = prefix + name
        if key in SECTIONS and isinstance(value, dict):
            found.update(_flat(value, source, f"{key}."))
        else:
            _require_known(key, value, source)
            found[key] = value
    return found


def _layer(values: Mapping[str, object], source_of: Callable[[str], str], *, text: bool = False) -> Layer:
    """Convert each value to the type of its key. `text` allows numbers that are written as text."""
    layer: Layer = {}
    for key, raw in values.items():
        try:
            value = msgspec.convert(_words(key, raw) if text else raw, _TYPES[key], strict=not text)
        except msgspec.ValidationError as exc:
            raise _error(key, raw, expectation(key), source_of(key)) from exc
        if isinstance(value, float) and not math.isfinite(value):
            raise _error(key, raw, expectation(key), source_of(key))
        layer[key] = Setting(value, source_of(key))
    return layer


def _words(key: str, raw: object) -> object:
    """Split the text of a list of names, which are separated by commas and may have brackets and quotes."""
    if typing.get_origin(_TYPES[key].__origin__) is not tuple:
        return raw
    return re.findall(r"[^\s,()\[\]'\"]+", str(raw))


def _reach(config: Config) -> int:
    generation = config.generation
    return choices.reach(generation.gate, generation.peers, generation.pipeline.kind)


def _check_together(config: Config, sources: dict[str, str]) -> None:
    """Reject combinations of values that are valid one by one but cannot run together."""
    for prefix, broker in (("broker", config.broker), ("edge.upstream", config.edge.upstream)):
        levels = broker.root.split("/")
        if any(not level or level.startswith("$") or level in {"+", "#"} for level in levels):
            wanted = "topic levels joined by '/', without wildcards"
            raise _error(f"{prefix}.root", broker.root, wanted, sources[f"{prefix}.root"])
        if broker.url:
            _check_address(f"{prefix}.url", broker, sources[f"{prefix}.url"])
    for name in config.agent.presets:
        if name not in presets():
            key, known = "agent.presets", presets()
            raise _error(key, name, f"a list of {', '.join(known)}", sources[key])
    pipeline = config.generation.pipeline
    if choices.PIPELINES[pipeline.kind].runs_ahead and pipeline.window < pipeline.block:
        key = "generation.pipeline.window"
        wanted = f"at least generation.pipeline.block, {pipeline.block}"
        raise _error(key, pipeline.window, wanted, sources[key])
    generation = config.generation
    if 0.0 < generation.audit < AUDIT_LEAST:
        key = "generation.audit"
        raise _error(key, generation.audit, f"0 or at least {AUDIT_LEAST}", sources[key])
    for name in generation.always_verify:
        try:
            rules_of([name])
        except ValueError as exc:
            key, wanted = "generation.always_verify", f"{', '.join(RULES)}, or {PATTERN} and a regular expression"
            raise _error(key, name, f"a list of {wanted}", sources[key]) from exc
    shared = COUPLINGS[generation.coupling].shared
    if choices.PEERS[generation.peers].asked and not shared:
        key = "generation.peers"
        wanted = f"'none' with generation.coupling {generation.coupling!r}, whose drafts come from a law that travels"
        raise _error(key, generation.peers, wanted, sources[key])
    if choices.PIPELINES[pipeline.kind].grows_trees and not (shared and choices.GATES[generation.gate].verifies_all):
        key = "generation.pipeline.kind"
        wanted = "another than 'tree' unless generation.coupling is 'gumbel' or 'greedy' and generation.gate 'always'"
        raise _error(key, pipeline.kind, wanted, sources[key])


def _check_address(key: str, broker: Broker, source: str) -> None:
    try:
        address = broker.address(key=key)
    except ConfigError as exc:
        raise _error(exc.key, exc.value, exc.expectation, source, exc.why) from exc
    if source.startswith("flag") and address.password is not None and not broker.password:
        raise _secret_on_command_line(key, broker.url)


def _require_known(key: str, value: object, source: str, spelling: Callable[[str], str] = str) -> None:
    if key in KEYS:
        return
    if key in SECTIONS:
        raise _error(key, value, "a section of keys, not a value", source)
    known = (*SECTIONS, *KEYS) if isinstance(value, dict) else KEYS
    raise UnknownKey(key, masked(key, value), near(key, known, spelling), source=source)


def near(word: str, known: Sequence[str], spelling: Callable[[str], str] = str) -> str:
    """Return a hint at the known word that may be meant by an unknown one."""
    close = [name for name in known if name.startswith(word)] or difflib.get_close_matches(word, known, n=1)
    return f"did you mean {spelling(close[0])}?" if close else "`fedhlm config explain` lists all keys"


def _unknown_preset(name: str, source: str, instead: str) -> ConfigError:
    near = difflib.get_close_matches(name, presets(), n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return _error("preset", name, f"one of {', '.join(presets())}{instead}{hint}", source)


def _secret_on_command_line(key: str, value: str) -> ConfigError:
    wanted = f"set by {environment_name(key)} or a file, since a command line is visible to others"
    return _error(key, value, wanted, f"flag --{key}")


def _error(key: str, value: object, expectation: str, source: str, why: str = "") -> ConfigError:
    return ConfigError(key, masked(key, value), expectation, why=why, source=source)


def default(key: str) -> str:
    """Return the default of a key as TOML."""
    return _shown(key, _lookup(_DEFAULTS, key))


def expectation(key: str) -> str:
    """Return the type and limits of a key in words, to follow "must be"."""
    info = msgspec.inspect.type_info(_TYPES[key])
    if isinstance(info, msgspec.inspect.Metadata):
        info = info.type
    match info:
        case msgspec.inspect.LiteralType(values=values):
            return f"one of {', '.join(str(value) for value in values)}" if len(values) > 1 else repr(values[0])
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType():
            return f"an integer {_limits(info)}"
        case msgspec.inspect.FloatType():
            return f"a number {_limits(info)}"
        case msgspec.inspect.VarTupleType(item_type=msgspec.inspect.LiteralType(values=values)):
            return f"a list of {', '.join(str(value) for value in values)}, in order of preference"
        case msgspec.inspect.StrType(pattern=str()):
            return f"1..{info.max_length} letters, digits, '.', '_' or '-', first a letter or digit"
        case msgspec.inspect.StrType(min_length=int(), max_length=int(most)):
            return f"text of 1 to {most} characters"
        case msgspec.inspect.StrType(min_length=int()):
            return "non-empty text"
        case _:
            return "text"


def _limits(info: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    low = f"above {info.gt:g}" if info.gt is not None else f"from {info.ge or 0:g}"
    high, word = (info.lt, "below") if info.lt is not None else (info.le, "up to")
    return f"{low} {word} {high if isinstance(high, int) else f'{high:g}'}"


def _shown(key: str, value: object) -> str:
    # A path may hold bytes that are not text, which must not stop the listing.
    return json.dumps(masked(key, value), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _lookup(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


_DEFAULTS: Final = Config()
