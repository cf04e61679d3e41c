"""The `fedhlm` command: parses, dispatches, and turns what users can act on into one line and an exit code.

Exit codes: 0 done, 1 not done as wished, 2 wrong usage or configuration, 130 interrupted. Whatever is heavy is imported by the
command that needs it, so that help and errors come at once.
"""

import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number
from msgspec.structs import asdict

from fedhlm.errors import FedhlmError

if TYPE_CHECKING:
    from fedhlm.config import Loaded

USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

Keys = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
Seconds = Annotated[float, Parameter(validator=Number(gt=0))]
Share = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]
Seed = Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))]


def _version() -> str:
    return metadata.version("fedhlm")


app = App(
    name="fedhlm",
    version=_version,
    version_flags=["--version"],
    help="Hybrid language models over MQTT: devices draft, the cloud's model settles what is doubtful.",
    help_format="plaintext",
)
config_app = App(name="config", help="Look at the configuration.")
models_app = App(name="models", help="Train, export, quantise and inspect models.")
app.command(config_app)
app.command(models_app)


@config_app.command(name="check")
def config_check(*keys: Keys, config: Path | None = None, preset: str | None = None) -> int:
    """Print the merged configuration and where each value comes from.

    Every key is also a flag: --generation.seed 7.

    Parameters
    ----------
    config
        TOML file.
    preset
        Shipped preset or path of a preset file.
    """
    from fedhlm.config import check

    print(check(_loaded(keys, config, preset)))
    return 0


@app.command
def presets() -> int:
    """List the shipped presets and what each promises."""
    from fedhlm import config
    from fedhlm.settings import DEFAULT_PRESET

    promises = config.presets()
    width = max(map(len, promises))
    for name, promise in promises.items():
        print(f"{name:<{width}}  {promise}{' (default)' if name == DEFAULT_PRESET else ''}")
    return 0


@app.command
def agent(*keys: Keys, config: Path | None = None, preset: str | None = None, prompt: str | None = None) -> int:
    """Run a device: it drafts with the small model and asks its edge.

    Every configuration key is also a flag: --agent.id porch --broker.url mqtt://edge:1883.

    Parameters
    ----------
    config
        TOML file.
    preset
        Shipped preset or path of a preset file.
    prompt
        Continue this text, print the result and end; without it the agent serves prompts from the bus.
    """
    loaded = _loaded(keys, config, preset)
    with _needing("agent"):
        from edge_agent.__main__ import main as run
    return run(loaded, prompt)


@app.command
def edge(*keys: Keys, config: Path | None = None, preset: str | None = None) -> int:
    """Run a cluster's edge, with its own MQTT broker when broker.url is empty.

    Every configuration key is also a flag: --cluster.name home --edge.upstream.url mqtt://cloud:1883.

    Parameters
    ----------
    config
        TOML file.
    preset
        Shipped preset or path of a preset file.
    """
    loaded = _loaded(keys, config, preset)
    with _needing("edge"):
        from edge_broker.__main__ import main as run
    return run(loaded)


@app.command
def cloud(*keys: Keys, config: Path | None = None, preset: str | None = None) -> int:
    """Run the verifier with the large model.

    Every configuration key is also a flag: --broker.url mqtt://localhost:1883 --cloud.threads 4.

    Parameters
    ----------
    config
        TOML file.
    preset
        Shipped preset or path of a preset file.
    """
    loaded = _loaded(keys, config, preset)
    with _needing("cloud"):
        from cloud_verifier.__main__ import main as run
    return run(loaded)


@app.command
def demo(
    *,
    preset: str = "budget",
    prompts: Path | None = None,
    tokens: Positive = 64,
    seed: Seed = 0,
    broker: str = "",
    duration: Seconds = 30.0,
    budget: Share | None = None,
    alpha: Annotated[float, Parameter(validator=Number(gt=0))] | None = None,
    temperature: Annotated[float, Parameter(validator=Number(gte=0, lte=10))] = 0.0,
    json: Path | None = None,
) -> int:
    """Run two clusters of two agents, two edges and a cloud over MQTT, and print who settled what at which price.

    After the run the same few prompts are asked under this preset, exact, fedhlm and hlm, in one table.

    Parameters
    ----------
    preset
        Shipped preset or path of a preset file.
    prompts
        Text file with one title a line, or .jsonl with title, text and topic; the shipped news by default.
    tokens
        Tokens per prompt.
    seed
        Seed of all generations.
    broker
        URL of an MQTT broker to use; by default the demo starts its own.
    duration
        Seconds after which no new prompt of the run is begun; the comparison comes after it.
    budget
        Error allowed per token, for presets with a learnt threshold; by default the preset's own.
    alpha
        Dirichlet concentration that shares out the news over the agents: 0.1 gives each few topics, 10 nearly all alike;
        by default all agents share one list.
    temperature
        Of the continued texts; topics are always asked for at 0.
    json
        File for the results.
    """
    with _needing("agent,edge,cloud"):
        from fleet.demo import run
    return run(
        preset=preset,
        prompts=prompts,
        tokens=tokens,
        seed=seed,
        broker=broker,
        duration_s=duration,
        budget=budget,
        alpha=alpha,
        temperature=temperature,
        json_file=json,
    )


@models_app.command(name="export")
def models_export(source: str, out: Path, *, tokenizer: Path | None = None, name: str | None = None) -> int:
    """Export a Hugging Face causal language model to ONNX, compared with torch.

    Parameters
    ----------
    source
        Model directory or hub id.
    out
        Folder to write.
    tokenizer
        Folder or file with tokenizer.json, for a source that has none.
    name
        Name of the model; by default that of the source.
    """
    with _needing("models"):
        from model_zoo.export import export
    export(source, out, tokenizer=tokenizer, name=name)
    return models_info(out)


@models_app.command(name="quantise")
def models_quantise(
    folder: Path, out: Path, *, mode: Literal["int8-dynamic", "weights-int8", "weights-fp16"] = "int8-dynamic"
) -> int:
    """Quantise an exported model.

    Parameters
    ----------
    folder
        Exported fp32 model.
    out
        Folder to write.
    mode
        int8-dynamic is for drafting; a cloud model takes one of the weights-only modes.
    """
    with _needing("models"):
        from model_zoo.quantise import quantise
    quantise(folder, out, mode)
    return models_info(out)


@models_app.command(name="info")
def models_info(folder: Path) -> int:
    """Describe a model folder.

    Parameters
    ----------
    folder
        Exported or quantised model.
    """
    with _needing("models"):
        from model_zoo.info import summary
    _print_facts(summary(folder))
    return 0


@models_app.command(name="train")
def models_train(runs: Path, *, data: Path | None = None, until: str | None = None) -> int:
    """Train the default pair stage by stage; what an earlier call finished is kept, what it began goes on.

    Parameters
    ----------
    runs
        Working folder.
    data
        Folder with ag_news/ and news_text/; by default FEDHLM_DATA, ../shared/data or the hub.
    until
        Last stage to run.
    """
    from fedhlm.telemetry import configure_logging

    with _needing("models"):
        from model_zoo.recipe import run_recipe
    configure_logging("INFO", "models")
    _print_facts(run_recipe(runs, data, until=until))
    return 0


@models_app.command(name="release")
def models_release(
    runs: Path,
    out: Path,
    *,
    data: Path | None = None,
    articles: Positive | None = None,
    prompts: Positive = 100,
    threads: Positive = 1,
) -> int:
    """Export, quantise and measure a trained pair, and write its model cards.

    Parameters
    ----------
    runs
        Working folder of `fedhlm models train`.
    out
        Folder for the two model folders.
    data
        Folder with ag_news/; by default FEDHLM_DATA, ../shared/data or the hub.
    articles
        Size of a random sample of the test split; all of it by default.
    prompts
        Number of titles that the LLM continues.
    threads
        Threads of the models while they are measured.
    """
    from fedhlm.telemetry import configure_logging

    with _needing("models"):
        from model_zoo.release import release
    configure_logging("INFO", "models")
    _print_facts(release(runs, out, data, articles=articles, prompts=prompts, threads=threads))
    return 0


@models_app.command(name="evaluate")
def models_evaluate(
    folder: Path,
    *,
    target: Path | None = None,
    data: Path | None = None,
    articles: Positive | None = None,
    prompts: Positive = 100,
    tokenizer: Path | None = None,
    threads: Positive = 1,
) -> int:
    """Measure topic accuracy and perplexity on the AG News test split and, with a target, how often both agree.

    Parameters
    ----------
    folder
        Exported model or Hugging Face directory.
    target
        Large model whose continuations the first one is to predict.
    data
        Folder with ag_news/; by default FEDHLM_DATA, ../shared/data or the hub.
    articles
        Size of a random sample; all of the split by default.
    prompts
        Number of titles that the target continues.
    tokenizer
        Folder with tokenizer.json, for a Hugging Face directory without one.
    threads
        Threads of an exported model.
    """
    with _needing("models"):
        from model_zoo import evaluate
        from model_zoo.corpus import load_ag_news
    split = load_ag_news("test", data)
    model = evaluate.open_model(folder, tokenizer=tokenizer, threads=threads)
    _print_facts(asdict(evaluate.evaluate(model, evaluate.sample(split, articles))))
    if target is not None:
        other = evaluate.open_model(target, tokenizer=tokenizer, threads=threads)
        _print_facts(asdict(evaluate.agreement(model, other, evaluate.sample(split, prompts))))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (the process's own by default) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given, result_action="return_value", exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except FedhlmError as exc:
        return _fail(str(exc))
    except CycloptsError as exc:
        return _fail(f"{exc} (fedhlm --help lists the commands)")
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; the interpreter's own flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code if isinstance(code, int) else 0


def parse_keys(tokens: Sequence[str]) -> dict[str, str]:
    """`--generation.seed 7` or `--generation.seed=7` as dotted keys with their text; a hyphen in a name stands for `_`.

    Raises:
        FedhlmError: a word that is no flag, or a flag without value.
    """
    found: dict[str, str] = {}
    rest = list(tokens)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        if not flag.startswith("--") or len(flag) == len("--"):
            raise FedhlmError(f"argument {flag!r}: --key value expected, such as --generation.seed 7")
        if not separator:
            if not rest or rest[0].startswith("--"):
                near = difflib.get_close_matches(flag, ("--config", "--preset", "--help"), n=1)
                raise FedhlmError(f"{flag} has no value{f', did you mean {near[0]}?' if near else ''}")
            value = rest.pop(0)
        found[flag.removeprefix("--").replace("-", "_")] = value
    return found


def _loaded(keys: Sequence[str], file: Path | None, preset: str | None) -> "Loaded":
    from fedhlm.config import load

    return load(file=file, preset=preset, flags=parse_keys(keys))


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    """Say which extra to install when a library is absent."""
    try:
        yield
    except ModuleNotFoundError as exc:
        library = (exc.name or "").partition(".")[0]
        if library in {"fedhlm", "edge_agent", "edge_broker", "cloud_verifier", "fleet", "lab", "model_zoo"}:
            raise
        raise FedhlmError(f"{library!r} is not installed: pip install 'fedhlm[{extra}]'") from exc


def _print_facts(facts: Mapping[str, object]) -> None:
    width = max(map(len, facts))
    for label, fact in facts.items():
        print(f"{label:<{width}}  {fact}")


def _fail(reason: str) -> int:
    print(f"fedhlm: {' '.join(reason.split())}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
