"""`fedhlm ask`: send a request to one agent, and print its answer as it arrives."""

import asyncio
import difflib
import inspect
import json as jsons
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from fedhlm.errors import AskError, BusError, ConfigError, FedhlmError
from fedhlm_fleet.commands.common import Keys, Seconds, Seed, Tokens, parse_keys

if TYPE_CHECKING:
    from fedhlm.answers import Result
    from fedhlm.client import Answer
    from fedhlm.config import Loaded
    from fedhlm_fleet.commands.paper import Plain

NAME: Final = "ask"
STDIN: Final = "-"
AWAY_S: Final = 5.0
FAILED: Final = 1
_OPTION: Final = re.compile(r"--[A-Za-z][\w.-]*(=.*)?", re.DOTALL)

Many = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]


def ask(
    *words: Keys,
    broker: str = "",
    cluster: str | None = None,
    tokens: Tokens = 64,
    seed: Seed | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    stop: Many = (),
    schema: Path | None = None,
    regex: str | None = None,
    grammar: Path | None = None,
    preset: str | None = None,
    receipt: Path | None = None,
    deadline: Seconds | None = None,
    wait: Seconds = AWAY_S,
    config: Path | None = None,
    json: bool = False,
) -> int:
    """Ask an agent to continue a text, and print what it writes: fedhlm ask AGENT TEXT.

    If TEXT is -, it is read from standard input. Unverified text is printed as [unverified: ...].
    Every configuration key is also a flag: --broker.ca ca.pem.
    Exit code 0: the answer is complete; 1: it is not; 130: interrupted, and the request is cancelled.

    Parameters
    ----------
    broker
        URL of the broker; by default broker.url.
    cluster
        Cluster of the agent; by default the configured one, or else the one in which the agent is online.
    tokens
        Maximum number of tokens to write.
    seed
        Seed of the text; by default a new one for each request.
    temperature
        Sampling temperature, 0 to 10; by default the agent's own.
    top_p
        Nucleus probability, above 0 and up to 1; by default the agent's own.
    top_k
        Number of likeliest tokens to sample from, 0 for all; by default the agent's own.
    min_p
        Least probability as a share of the likeliest token's, 0 to 1; by default the agent's own.
    stop
        End the text before this string; may be given several times.
    schema
        File with a JSON schema, under which the answer is valid.
    regex
        Regular expression that the whole answer matches.
    grammar
        File with a grammar, in llguidance's Lark dialect, that the whole answer follows.
    preset
        Name of a shipped preset; by default the agent's own.
    receipt
        File to write the answer to, with the receipt that fedhlm verify-receipt checks. The LLM must have verified
        every token, as under the preset exact.
    deadline
        Seconds within which the whole answer must arrive.
    wait
        Seconds to wait for an agent that is offline.
    config
        TOML file with the broker's keys.
    json
        Print one JSON object instead of the text: text, ids, sources, finish, statistics.
    """
    from fedhlm.config import load
    from fedhlm.telemetry import configure_logging

    options = (f"--{name.replace('_', '-')}" for name in inspect.signature(ask).parameters)
    agent, text, keys = read_words(words, [*options, "--help"])
    loaded = load(file=config, flags=parse_keys(keys) | ({"broker.url": broker} if broker else {}))
    form = loaded.config.telemetry.log_format
    configure_logging("ERROR", NAME, secrets=(loaded.config.broker.password,), form=form)
    asked = {
        "max_tokens": tokens,
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "stop": stop,
        "grammar": read_form(schema, regex, grammar),
        "preset": preset,
        "receipt": receipt is not None,
        "deadline_s": deadline,
    }
    given = loaded.sources["cluster.name"] != "default"
    place = cluster or (loaded.config.cluster.name if given else None)
    if text == STDIN:
        text = read_text()
    return asyncio.run(_ask(loaded, agent, text, cluster=place, away_s=wait, json=json, receipt=receipt, asked=asked))


def read_words(words: Sequence[str], options: Sequence[str] = ()) -> tuple[str, str, list[str]]:
    """Split the arguments into the agent, the text, and the flags for configuration keys; misspelt `options` get a hint.

    Raises:
        FedhlmError: there are not exactly two words, agent and text, or an option is unknown.
    """
    plain: list[str] = []
    keys: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not _OPTION.fullmatch(word):
            plain.append(word)
            continue
        name, separator, _ = word.partition("=")
        if "." not in name:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]}?" if near else "a text that looks like one is read from standard input (-)"
            raise FedhlmError(f"{name} is not an option of fedhlm ask: {hint}")
        keys += [word] if separator else [word, *rest[:1]]
        del rest[: 0 if separator else 1]
    if len(plain) != 2:
        raise ConfigError("fedhlm ask", " ".join(plain), "followed by AGENT TEXT; quote a text of several words")
    return plain[0], plain[1], keys


def read_form(schema: Path | None, regex: str | None, grammar: Path | None) -> str | None:
    """The grammar that the answer must follow; None: any text.

    Raises:
        ConfigError: more than one form is given, or a file cannot be used.
    """
    from fedhlm.decoding.grammar import of_regex, of_schema

    given = {"--schema": schema, "--regex": regex, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(names[1], given[names[1]], f"left out where {names[0]} is given")
    if regex is not None:
        return of_regex(regex)
    if grammar is not None:
        return _read_file("--grammar", grammar)
    if schema is None:
        return None
    try:
        found = jsons.loads(_read_file("--schema", schema))
    except ValueError as exc:
        raise ConfigError("--schema", str(schema), "a file with a JSON schema", why=str(exc)) from exc
    if not isinstance(found, dict):
        raise ConfigError("--schema", str(schema), "a file with a JSON schema, which is an object")
    return of_schema(found)


def _read_file(option: str, path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ConfigError(option, str(path), "a file of UTF-8 text that can be read", why=why) from exc


def read_text() -> str:
    """Read all of standard input.

    Raises:
        ConfigError: the input is not UTF-8.
    """
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ConfigError("text", "standard input", "UTF-8", why=f"{exc.reason} at byte {exc.start}") from exc


async def _ask(
    loaded: "Loaded",
    agent: str,
    text: str,
    *,
    cluster: str | None,
    away_s: float,
    json: bool,
    receipt: Path | None,
    asked: dict[str, Any],
) -> int:
    from fedhlm.client import Client
    from fedhlm_fleet.commands.paper import paper_of

    client = Client(loaded.config.broker, cluster=cluster, name=NAME, away_s=away_s)
    answer = client.ask(agent, text, **asked)  # validated before anything connects to a broker
    try:
        async with client, answer:
            status = await _told(answer, None if json else paper_of(loaded.config))
            return status if status or receipt is None else _kept(answer.result, receipt)
    except BusError as exc:
        print(f"fedhlm: {exc}", file=sys.stderr)
        return FAILED


async def _told(answer: "Answer", paper: "Plain | None") -> int:
    """Print an answer on paper, or as JSON if there is none."""
    failure: AskError | BusError | None = None
    try:
        async for piece in answer:
            if paper is not None:
                paper.put(piece)
    except (AskError, BusError) as exc:
        failure = exc
    result = answer.result
    if paper is None:
        print(as_json(result, failure))
    elif failure is None or result.ids:
        paper.end(result)
    if failure is not None:
        print(f"fedhlm: {' '.join(str(failure).split())}", file=sys.stderr)
    elif paper is not None and paper.marks.unverified:
        print(f"fedhlm: {paper.marks.summary()}", file=sys.stderr)
    return 0 if failure is None else FAILED


def _kept(result: "Result", receipt: Path) -> int:
    """Write an answer with its receipt to a file, and return the exit code."""
    from fedhlm.process.files import replace_file

    found = result.verifiable()
    if found is None:
        print("fedhlm: the answer has no receipt: the LLM has not verified every token", file=sys.stderr)
        return FAILED
    try:
        replace_file(receipt, found + b"\n")
    except OSError as exc:
        raise ConfigError(
            "--receipt", str(receipt), "a file that can be written", why=exc.strerror or str(exc)
        ) from exc
    return 0


def as_json(result: "Result", failure: FedhlmError | None) -> str:
    """Format an answer as one line of JSON; it has an `error` if the answer is incomplete."""
    shown: dict[str, Any] = {
        "text": result.text,
        "ids": result.ids,
        "sources": result.sources,
        "finish": result.finish,
        "statistics": result.statistics,
    }
    if failure is not None:
        shown["error"] = str(failure)
    return jsons.dumps(shown)
