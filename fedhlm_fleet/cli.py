"""The `fedhlm` command: parses the command line, runs the command, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 failure, 2 wrong usage or configuration, 130 interrupted. Each command imports its own heavy
libraries, so that help and errors appear at once.
"""

import errno
import json as jsons
import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import App, CycloptsError, Parameter

from fedhlm.errors import ConfigError, FedhlmError, root_of
from fedhlm_fleet.commands import (
    ask,
    console,
    doctor,
    federation,
    flash,
    fleet,
    lab,
    models,
    pki,
    provision,
    receipts,
    simulate,
    status,
    top,
    trace,
    traces,
)
from fedhlm_fleet.commands.common import (
    DEFAULTS,
    OPTIONS,
    Keys,
    Seconds,
    Seed,
    Share,
    SourceFlags,
    Tokens,
    flowing,
    needing,
    parse_keys,
    present,
    require_option_or_key,
    require_text,
)
from fedhlm_fleet.commands.mistakes import Between, sentence

if TYPE_CHECKING:
    from fedhlm.answering import Door
    from fedhlm.config import Loaded
    from fedhlm.receipts import Receipt, Sign

USAGE_ERROR: Final = 2
NOT_DONE: Final = 1
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
# Libraries that are imported late: a child process would report a missing one as an error of its own.
DEMO: Final = ("onnxruntime", "tokenizers")
SERVING: Final = ("starlette", "uvicorn")
REGROUPING: Final = ("scipy", "sklearn", "threadpoolctl")


def _version() -> str:
    return metadata.version("fedhlm")


AsJson = Annotated[bool, Parameter(negative="", show_default=False)]
Prompt = Annotated[str | None, Parameter(allow_leading_hyphen=True)]

app = App(
    name="fedhlm",
    version=_version,
    version_flags=["--version"],
    help="Run hybrid language models over MQTT: small models on devices draft, a large model in the cloud verifies.",
    help_format="plaintext",
)
config_app = App(name="config", help="Check and explain the configuration.")
app.command(config_app)
app.command(ask.ask)
app.command(models.app)
app.command(lab.app)
app.command(fleet.app)
app.command(federation.app)
app.command(pki.app)
app.command(simulate.simulate)
app.command(traces.record)
app.command(traces.replay)
app.command(trace.app)
app.command(doctor.doctor)
app.command(status.status)
app.command(console.console)
app.command(top.top)
app.command(receipts.verify_receipt)
app.command(flash.flash)
app.command(provision.app)


@config_app.command(name="check")
def config_check(*keys: Keys, files: SourceFlags = DEFAULTS, json: AsJson = False) -> int:
    """Print the merged configuration and the source of each value.

    Every configuration key is also a flag: --generation.seed 7.

    Parameters
    ----------
    json
        Print one JSON object instead of the table: the source of each key and its value, as in TOML.
    """
    from fedhlm.config import check

    loaded = _loaded(keys, files, (*OPTIONS, "--json"))
    if json:
        print(jsons.dumps({key: {"value": value, "source": source} for key, value, source in loaded.rows()}))
    else:
        print(check(loaded))
    return 0


@config_app.command(name="explain")
def config_explain(*keys: Keys, files: SourceFlags = DEFAULTS) -> int:
    """Explain a key, a section or a preset: what it does, its limits, its default and its current value.

    fedhlm config explain generation.budget; without a name, list all keys. Every configuration key is also a flag.
    """
    from fedhlm.explain import explain

    require_option_or_key(keys[:1])
    named = 1 if keys and (len(keys) == 1 or not keys[0].startswith("--")) else 0
    print(explain(_loaded(keys[named:], files), keys[0] if named else ""))
    return 0


@app.command
def presets(*, json: AsJson = False) -> int:
    """List the shipped presets and what each one promises.

    Parameters
    ----------
    json
        Print one JSON object instead of the list: the promise of each preset, by name.
    """
    from fedhlm import config
    from fedhlm.settings import DEFAULT_PRESET

    promises = config.presets()
    if json:
        print(jsons.dumps(promises))
        return 0
    width = max(map(len, promises))
    for name, promise in promises.items():
        print(f"{name:<{width}}  {promise}{' (default)' if name == DEFAULT_PRESET else ''}")
    return 0


@app.command
def agent(*keys: Keys, files: SourceFlags = DEFAULTS, prompt: Prompt = None, serve: str = "") -> int:
    """Run an agent, which drafts with the small model and sends drafts to its edge to be verified.

    Every configuration key is also a flag: --agent.id porch --broker.url mqtt://edge:1883.

    Parameters
    ----------
    prompt
        Continue this text, print the result and exit. Without it, the agent serves requests from the bus.
    serve
        HOST:PORT on which to serve the APIs of OpenAI and Ollama, too; the same as --api.listen.
    """
    loaded = _loaded(keys, files, (*OPTIONS, "--prompt", "--serve"), serve)
    if prompt is not None:
        require_text("--prompt", prompt)
    with needing("agent"):
        from edge_agent.__main__ import main as run
        from fedhlm_zoo.shipped import with_agent_model

        return run(with_agent_model(loaded), prompt, door=_door(loaded), sign=_sign(loaded))


@app.command
def edge(*keys: Keys, files: SourceFlags = DEFAULTS) -> int:
    """Run the edge of a cluster; it starts its own MQTT broker when broker.url is empty.

    Every configuration key is also a flag: --cluster.name home --edge.upstream.url mqtt://cloud:1883.
    """
    loaded = _loaded(keys, files)
    with needing("edge"):
        from edge_broker.__main__ import main as run

        return run(loaded)


@app.command
def cloud(*keys: Keys, files: SourceFlags = DEFAULTS, serve: str = "") -> int:
    """Run the cloud, which verifies drafts with the large model.

    Every configuration key is also a flag: --broker.url mqtt://localhost:1883 --cloud.threads 4.

    Parameters
    ----------
    serve
        HOST:PORT on which to serve the APIs of OpenAI and Ollama, too: the large model alone. The same as --api.listen.
    """
    loaded = _loaded(keys, files, (*OPTIONS, "--serve"), serve)
    with needing("cloud"):
        if loaded.config.federation.assign_s:
            present(*REGROUPING)
        from cloud_verifier.__main__ import main as run
        from fedhlm_zoo.shipped import with_cloud_model

        return run(with_cloud_model(loaded), door=_door(loaded))


@app.command
def demo(
    *,
    preset: str = "budget",
    prompts: Path | None = None,
    tokens: Tokens = 64,
    seed: Seed = 0,
    broker: str = "",
    duration: Seconds = 30.0,
    pair: str = "",
    budget: Share | None = None,
    alpha: Annotated[float, Parameter(validator=Between(gt=0))] | None = None,
    temperature: Annotated[float, Parameter(validator=Between(gte=0, lte=10))] = 0.0,
    json: Path | None = None,
    record: Path | None = None,
    truth: bool = False,
    console: bool = False,
) -> int:
    """Run two clusters of two agents, two edges and a cloud over MQTT, and print who settled the tokens at what cost.

    After the run, one table compares this preset with exact, fedhlm and hlm on the same few prompts.

    Parameters
    ----------
    preset
        Name of a shipped preset, or path of a preset file.
    prompts
        Text file with one title per line, or .jsonl file with title, text and topic; by default the shipped news.
    tokens
        Tokens per prompt.
    seed
        Seed of the whole run.
    broker
        URL of an MQTT broker; by default the demo starts its own.
    duration
        Seconds after which the run starts no new prompt; the comparison follows.
    pair
        Folder that `fedhlm models pair` wrote, or the name of one among your models; by default the shipped models.
    budget
        Allowed error per token, for presets with a learnt threshold; by default the preset's own.
    alpha
        Dirichlet concentration of the topics over the agents: with 0.1 each agent has few topics, with 10 nearly the
        same mix as the others. By default all agents share one list.
    temperature
        Temperature of the continued texts; questions for a topic always use 0.
    json
        JSON file to write the results to.
    record
        File to record all messages to, journals included; there is no comparison then.
    console
        Show the fleet in a browser as well, at an address on this machine that is printed; see docs/console.md.
    truth
        Have the LLM score every kept token of the run afterwards, and print the truth beside each certificate.
    """
    with needing("agent,edge,cloud"):
        present(*DEMO)  # the child processes need them
        from fedhlm_fleet.demo.run import run
    if console:
        with needing("serve"):
            present(*SERVING)
    return run(
        preset=preset,
        prompts=prompts,
        tokens=tokens,
        seed=seed,
        broker=broker,
        duration_s=duration,
        pair=pair,
        budget=budget,
        alpha=alpha,
        temperature=temperature,
        json_file=json,
        recording=record,
        truth=truth,
        with_console=console,
    )


@app.command
def completion(*, shell: Literal["bash", "zsh", "fish"] | None = None) -> int:
    """Install the completion of commands and options for your shell; a new terminal has it.

    Parameters
    ----------
    shell
        Your shell; by default the one that this command is typed in.
    """
    from cyclopts.completion.detect import ShellDetectionError

    try:
        path = app.install_completion(shell=shell)
    except ShellDetectionError as exc:
        raise ConfigError("--shell", None, "bash, zsh or fish, as your shell was not recognised") from exc
    print(f"installed {path}; open a new terminal")
    return 0


flowing(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of the process, and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # the parent process has closed it
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end of the process
    try:
        code = app(given, result_action="return_value", exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as exc:
        return _fail(sentence(exc))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (FedhlmError, OSError, BaseExceptionGroup) as exc:
        return _ended_by(root_of(exc) if isinstance(exc, BaseExceptionGroup) else exc)
    return code if isinstance(code, int) else 0


def _ended_by(error: BaseException) -> int:
    match error:
        case FedhlmError():
            return _fail(str(error))
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():
            _give_up_stdout()
            return BROKEN_PIPE
        case OSError(errno=errno.ENOSPC | errno.EIO | errno.EDQUOT, filename=None):
            _give_up_stdout()
            _fail(f"standard output must be writable (got {error.strerror})")
            return NOT_DONE
        case OSError(strerror=str(), filename=str() | bytes()):
            _fail(f"{os.fsdecode(error.filename)}: {error.strerror}")
            return NOT_DONE
        case _:
            raise error


def _give_up_stdout() -> None:
    """Send the rest of the buffer to /dev/null, so that the interpreter's flush at exit raises no second error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _loaded(keys: Sequence[str], files: SourceFlags, options: Sequence[str] = OPTIONS, serve: str = "") -> "Loaded":
    from fedhlm.config import load

    flags = parse_keys(keys, options)
    return load(file=files.config, preset=files.preset, flags=flags | ({"api.listen": serve} if serve else {}))


def _door(loaded: "Loaded") -> "Door":
    """The door for clients of the APIs; one that lets nobody in, and loads no library, unless `api.listen` is set."""
    from fedhlm.answering import shut

    if not loaded.config.api.listen:
        return shut
    with needing("serve"):
        from fedhlm_doors.serving import door_of

        return door_of(loaded.config.api)


def _sign(loaded: "Loaded") -> "Sign":
    """How receipts are signed: with the device's key, for which the library is loaded at the first receipt."""
    from fedhlm.receipts import unsigned

    broker = loaded.config.broker
    if not (broker.cert and broker.key) or find_spec("cryptography") is None:
        return unsigned

    @cache
    def signer() -> "Sign":
        from fedhlm_doors.signing import signer_of

        return signer_of(broker)

    def sign(receipt: "Receipt") -> "Receipt":
        return signer()(receipt)

    return sign


def _fail(reason: str) -> int:
    print(f"fedhlm: {' '.join(reason.split())}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
