"""What the commands share: validated parameter types, configuration keys as flags, and hints for missing libraries."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter, Token

from fedhlm.errors import ConfigError, FedhlmError
from fedhlm_fleet.commands.mistakes import Between


def whole(_type: type, tokens: Sequence[Token]) -> int:
    """Read an integer. cyclopts alone would round "1.5".

    Raises:
        ValueError: the text is not an integer.
    """
    return int(tokens[0].value)


Positive = Annotated[int, Parameter(validator=Between(gte=1, lte=1_000_000), converter=whole)]
Jobs = Annotated[int, Parameter(validator=Between(gte=1, lte=1_024), converter=whole)]
Fleet = Annotated[int, Parameter(validator=Between(gte=1, lte=10_000), converter=whole)]
Tokens = Annotated[int, Parameter(validator=Between(gte=1, lte=65_536), converter=whole)]  # fields.MAX_TOKENS
Seconds = Annotated[float, Parameter(validator=Between(gt=0))]
Share = Annotated[float, Parameter(validator=Between(gt=0, lte=1))]
Seed = Annotated[int, Parameter(validator=Between(gte=0, lt=2**63), converter=whole)]
SHOWN: Final = 32  # characters shown before a byte that is not UTF-8
PACKAGES: Final = (
    "fedhlm",
    "edge_agent",
    "edge_broker",
    "cloud_verifier",
    "fedhlm_doors",
    "fedhlm_fleet",
    "fedhlm_lab",
    "fedhlm_traces",
    "fedhlm_zoo",
)
OPTIONS: Final = ("--config", "--preset", "--help")  # every command that takes keys has them
PLAIN: Final[Mapping[str, Callable[[str], bool]]] = {  # options whose value people give without the option's name
    "--trace": lambda word: word.endswith(".trace"),
    "--broker": lambda word: word.startswith(("mqtt://", "mqtts://")),
    "--config": lambda word: word.endswith(".toml"),
}
Keys = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


def flowing(app: App) -> None:
    """Join the lines of all commands' docstrings that end inside a sentence: a terminal breaks them where it must."""
    for name in app:
        if not name.startswith("-"):
            command = app[name]
            if command.default_command is not None:
                command.default_command.__doc__ = _joined(command.default_command.__doc__ or "")
            flowing(command)


def _joined(text: str) -> str:
    lines: list[str] = []
    for line in text.splitlines():
        before = lines[-1] if lines else ""
        indented = len(line) - len(line.lstrip()), len(before) - len(before.lstrip())
        words = before.strip(" -") and line.strip(" -") and not before.endswith((".", ":"))
        if words and (len(lines) == 1 or indented[0] == indented[1]):
            lines[-1] = f"{before} {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """The flags that name where the configuration comes from."""

    config: Path | None = None
    """TOML file."""

    preset: str | None = None
    """Name of a shipped preset, or path of a preset file."""


DEFAULTS: Final = SourceFlags()


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Turn the error of a missing library into one that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as exc:
        library = (exc.name or "").partition(".")[0]
        if library in PACKAGES:
            raise
        raise FedhlmError(f"{library!r} is not installed: pip install 'fedhlm[{extra}]'") from exc


def present(*libraries: str) -> None:
    """Check that libraries are installed, without importing them.

    Raises:
        ModuleNotFoundError: names the first library that is missing.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)


def parse_keys(tokens: Sequence[str], options: Sequence[str] = OPTIONS) -> dict[str, str]:
    """Parse `--generation.seed 7` or `--generation.seed=7` into dotted keys and texts; a hyphen in a key becomes `_`.

    `options` are the command's own options, from which the error for a misspelt option makes its suggestion.

    Raises:
        FedhlmError: a word is not a flag, a flag has no value, or a flag is a misspelt option.
    """
    found: dict[str, str] = {}
    rest = list(tokens)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        if not flag.startswith("--") or len(flag) == len("--"):
            meant = next(
                (f": did you mean {o} {flag}?" for o, ends in PLAIN.items() if o in options and ends(flag)), ""
            )
            raise FedhlmError(f"argument must be --key value, such as --generation.seed 7 (got {flag!r}){meant}")
        require_option_or_key([flag], options)
        if not separator:
            if not rest or rest[0].startswith("--"):
                raise FedhlmError(f"{flag} must be given a value (got nothing)")
            value = rest.pop(0)
        found[flag.removeprefix("--").replace("-", "_")] = value
    return found


def require_option_or_key(flags: Sequence[str], options: Sequence[str] = OPTIONS) -> None:
    """Reject a flag that is near one of the command's options, and so no configuration key.

    Raises:
        FedhlmError: the message names the option.
    """
    for flag in flags:
        near = difflib.get_close_matches(flag.partition("=")[0], options, n=1)
        if flag.startswith("--") and "." not in flag and near:
            raise FedhlmError(f"{flag} is not an option of this command: did you mean {near[0]}?")


def require_text(key: str, given: str) -> None:
    """Reject an argument that is not UTF-8; Python keeps such bytes as surrogates.

    Raises:
        ConfigError: the message shows the bytes as escapes.
    """
    try:
        given.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(key, given[max(0, exc.start - SHOWN) : exc.start + 1], "UTF-8 text") from exc


def print_facts(facts: Mapping[str, object]) -> None:
    """Print one fact per line, with the values aligned."""
    width = max(map(len, facts))
    for label, fact in facts.items():
        print(f"{label:<{width}}  {fact}")
