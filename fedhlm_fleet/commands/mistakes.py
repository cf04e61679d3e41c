"""What is wrong with a command line, in one sentence: `KEY must be EXPECTED (got VALUE)`, or a hint at what was meant."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

from cyclopts import App, CycloptsError
from cyclopts.argument import Argument
from cyclopts.exceptions import (
    CoercionError,
    ConsumeMultipleError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)

# Commands of other programs that people type here first.
_ELSEWHERE: Final[dict[str, str]] = (
    dict.fromkeys(("chat", "complete", "generate", "prompt"), "fedhlm ask AGENT TEXT asks an agent")
    | dict.fromkeys(("serve", "server"), "fedhlm agent --serve HOST:PORT serves the APIs, and so does fedhlm cloud")
    | dict.fromkeys(
        ("run", "start", "up"), "fedhlm demo runs a whole fleet; fedhlm agent, edge and cloud run its parts"
    )
    | dict.fromkeys(("list", "ls", "ps"), "fedhlm fleet list lists the parts of a fleet")
    | dict.fromkeys(("dashboard", "ui", "web"), "fedhlm console shows a fleet in a browser")
    | dict.fromkeys(("monitor", "watch", "logs"), "fedhlm top shows a fleet as it works")
    | dict.fromkeys(("help", "version"), "the options are --help and --version")
)
_KINDS: Final[dict[object, str]] = {
    int: "an integer", float: "a number", bool: "true or false", str: "a text", Path: "a path"
}  # fmt: skip


@dataclass(frozen=True)
class Between:
    """The limits of a number, as a validator of cyclopts. No number that is not finite is within them."""

    gte: float | None = None
    gt: float | None = None
    lte: float | None = None
    lt: float | None = None

    @property
    def words(self) -> str:
        """The limits, to follow "a number"."""
        low = f"above {self.gt}" if self.gt is not None else f"from {self.gte or 0}"
        if self.lte is None and self.lt is None:
            return low if self.gt is not None else f"of at least {self.gte or 0}"
        return f"{low} up to {self.lte}" if self.lte is not None else f"{low} below {self.lt or 0}"

    def __call__(self, _kind: object, value: Any) -> None:
        """Check a value, or each of several; None is no value.

        Raises:
            ValueError: a value is outside the limits.
        """
        if isinstance(value, Sequence) and not isinstance(value, str):
            for one in value:
                self(_kind, one)
        elif value is not None and not self._holds(value):
            raise ValueError(self.words)

    def _holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if (self.gte is not None and value < self.gte) or (self.gt is not None and value <= self.gt):
            return False
        return not ((self.lte is not None and value > self.lte) or (self.lt is not None and value >= self.lt))


def sentence(error: CycloptsError, program: str = "fedhlm") -> str:
    """Say what is wrong with a command line of a program."""
    command = " ".join([program, *(error.command_chain or ())])
    match error:
        case UnknownCommandError(unused_tokens=[str(word), *_]):
            elsewhere = _ELSEWHERE.get(word) if command == program else None
            return f"{word!r} is not a command of {command}: {elsewhere or _meant(word, _commands(error.app), command)}"
        case UnknownOptionError(token=token):
            word = (token.keyword or token.value).partition("=")[0]
            names = [name for one in error.argument_collection if one.parse for name in one.names]
            return f"{word!r} is not an option of {command}: {_meant(word, names, command)}"
        case UnusedCliTokensError(unused_tokens=[str(word), *_]):
            return f"{command} must be given no further argument (got {word!r})"
        case RepeatArgumentError(token=token):
            return f"{token.keyword} must be given once (got a second {token.value!r})"
        case (
            ConsumeMultipleError(argument=Argument() as argument)
            | MissingArgumentError(argument=Argument() as argument)
        ):
            return f"{_name(argument, error)} must be {_expected(argument)} (got nothing)"
        case CoercionError(argument=Argument() as argument, token=token):
            given = "nothing" if token is None else repr(token.value)
            return f"{_name(argument, error)} must be {_expected(argument, given)} (got {given})"
        case ValidationError(argument=Argument() as argument):
            given = " ".join(token.value for token in argument.tokens)
            return f"{_name(argument, error)} must be {_expected(argument)} (got {given!r})"
        case _:
            return str(error)


def _meant(word: str, known: Sequence[str], command: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"{command} --help lists them"


def _commands(app: App | None) -> list[str]:
    return [] if app is None else list(app)


def _name(argument: Argument, error: CycloptsError) -> str:
    """The option as it was typed, or the name of a positional argument."""
    typed = next((token.keyword for token in argument.tokens if token.keyword), None) or getattr(error, "keyword", None)
    if typed:
        return str(typed)
    return argument.name if argument.field_info.is_keyword_only else argument.name.removeprefix("--").upper()


def _expected(argument: Argument, given: str = "") -> str:
    """What a value of an option must be, with a hint if something close to a choice was given."""
    kind = _without_none(argument.hint)
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        near = difflib.get_close_matches(given.strip("'"), choices, n=1)
        return f"one of {', '.join(choices)}{f', did you mean {near[0]!r}?' if near else ''}"
    validators: Any = argument.parameter.validator
    limits = [one.words for one in validators if isinstance(one, Between)]
    return " ".join([_KINDS[kind], *limits])


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        return next(one for one in get_args(kind) if one is not type(None))
    return kind
