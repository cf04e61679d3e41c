"""The command as users meet it: quick, helpful on mistakes, one line per error, silent about secrets."""

import inspect
import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fedhlm.config import KEYS, Loaded, presets
from fedhlm.errors import FedhlmError
from fedhlm.protocol.fields import MAX_TOKENS
from fedhlm.settings import DEFAULT_PRESET
from fedhlm_fleet import cli
from fedhlm_fleet.commands.common import needing
from tests.processes import obey_interrupts

PROGRAM = Path(sys.executable).with_name("fedhlm")
SECRET = "correct horse battery staple"


def fedhlm(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments], env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=60
    )


def refused(*arguments: str | Path, **environ: str) -> str:
    """The one line on stderr of a command that must fail as wrong usage."""
    done = fedhlm(*arguments, **environ)
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("fedhlm: ")
    return line


def test_the_version_is_the_distribution_s() -> None:
    assert fedhlm("--version").stdout.strip() == metadata.version("fedhlm")


def test_help_lists_every_command() -> None:
    done = fedhlm("--help")
    assert done.returncode == 0
    for command in ("agent", "ask", "cloud", "config", "demo", "edge", "models", "presets"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "command",
    ["agent", "ask", "edge", "cloud", "demo", "config check", "presets"]
    + [f"models {name}" for name in ("export", "quantise", "info", "train", "evaluate")],
)
def test_every_command_explains_itself(command: str) -> None:
    done = fedhlm(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: fedhlm {command}" in done.stdout


def test_help_breaks_lines_where_the_terminal_ends_and_nowhere_else() -> None:
    done = fedhlm("console", "--help", COLUMNS="300")
    assert "the certificate of an observer lets it see everything." in done.stdout
    assert "\nEvery configuration key is also a flag" in done.stdout, "a sentence of its own stays one"
    assert "nearly the same mix as the others" in fedhlm("demo", "--help", COLUMNS="400").stdout


def test_start_up_loads_nothing_heavy() -> None:
    code = "import sys; from fedhlm_fleet.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    for arguments in (["--help"], ["models", "--help"], ["demo", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
        assert "cyclopts" in loaded
        assert not loaded & {
            "numpy",
            "onnxruntime",
            "tokenizers",
            "torch",
            "transformers",
            "aiomqtt",
            "sklearn",
            "pandas",
        }


# config check and presets


def test_config_check_prints_every_key_with_value_and_source(tmp_path: Path) -> None:
    file = tmp_path / "home.toml"
    file.write_text('[cluster]\nname = "barn"\n', "utf-8")
    done = fedhlm(
        "config",
        "check",
        "--config",
        file,
        "--preset",
        "hlm",
        "--generation.max-tokens=9",
        "--agent.id",
        "porch",
        FEDHLM_GENERATION__SEED="7",
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()[1:]}
    assert list(rows) == list(KEYS)
    assert rows["cluster.name"] == ['"barn"', f"file {file}"]
    assert rows["generation.seed"] == ["7", "env FEDHLM_GENERATION__SEED"]
    assert rows["generation.max_tokens"] == ["9", "flag --generation.max_tokens"]
    assert rows["agent.id"] == ['"porch"', "flag --agent.id"]
    assert rows["generation.coupling"] == ['"full"', "preset hlm"]
    assert rows["generation.temperature"] == ["0.8", "default"]


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".local/share/bash-completion/completions/fedhlm"),
        ("zsh", ".zsh/completions/_cyclopts_fedhlm"),
        ("fish", ".config/fish/completions/fedhlm.fish"),
    ],
)
def test_one_command_installs_the_completion_of_a_shell(shell: str, file: str, tmp_path: Path) -> None:
    done = fedhlm("completion", "--shell", shell, HOME=str(tmp_path))
    assert done.stdout == f"installed {tmp_path / file}; open a new terminal\n", done.stderr
    if shell == "bash":
        complete = f"source {tmp_path / file}; COMP_WORDS=(fedhlm con); COMP_CWORD=1; _fedhlm; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", complete], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["config", "console"], done.stderr


def test_configuration_and_presets_are_printed_for_scripts() -> None:
    told = json.loads(fedhlm("config", "check", "--json", "--generation.seed", "7").stdout)
    assert told["generation.seed"] == {"value": "7", "source": "flag --generation.seed"}
    assert told.keys() == set(KEYS)
    secret = fedhlm("config", "check", "--json", FEDHLM_BROKER__PASSWORD=SECRET)
    assert "broker.password" in secret.stdout
    assert SECRET not in secret.stdout
    assert json.loads(fedhlm("presets", "--json").stdout) == presets()


def test_a_password_is_neither_printed_nor_taken_from_the_command_line() -> None:
    done = fedhlm("config", "check", FEDHLM_BROKER__PASSWORD=SECRET)
    assert done.returncode == 0
    assert SECRET not in done.stdout + done.stderr
    assert '"***"' in done.stdout
    assert SECRET not in refused("config", "check", "--broker.password", SECRET)


def test_presets_are_listed_with_their_promise() -> None:
    done = fedhlm("presets")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert list(lines) == [
        "budget", "colocated", "cu-hlm", "exact", "fedhlm", "hlm", "llm-only", "rand-hlm", "slm-only", "speculative", "u-hlm"
    ]  # fmt: skip
    for name, promise in presets().items():
        assert promise in lines[name]
        assert lines[name].endswith(" (default)") == (name == DEFAULT_PRESET)
    assert "identical to the LLM alone" in lines["exact"]


def test_the_demo_s_default_is_the_default_preset() -> None:
    assert inspect.signature(cli.demo).parameters["preset"].default == DEFAULT_PRESET


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["confg"], "did you mean config?"),
        (["config", "chek"], "did you mean check?"),
        (["presets", "extra"], "extra"),
        (["serve"], "fedhlm agent --serve HOST:PORT serves the APIs"),
        (["ls"], "fedhlm fleet list lists the parts"),
        (["fleet", "ls"], "did you mean list?"),
        (["console", "monday.trace"], "did you mean --trace monday.trace?"),
        (["top", "mqtt://edge:1883"], "did you mean --broker mqtt://edge:1883?"),
        (["edge", "home.toml"], "did you mean --config home.toml?"),
        (["demo", "--tokns", "3"], "did you mean --tokens?"),
        (["demo", "--tokens", "0"], f"--tokens must be an integer from 1 up to {MAX_TOKENS} (got '0')"),
        (["demo", "--tokens", str(MAX_TOKENS + 1)], f"--tokens must be an integer from 1 up to {MAX_TOKENS}"),
        (["demo", "--tokens", "1.5"], f"--tokens must be an integer from 1 up to {MAX_TOKENS} (got '1.5')"),
        (["demo", "--seed", str(2**64)], "--seed must be an integer from 0 below 9223372036854775808"),
        (
            ["ask", "porch", "Oil", "--seed", "0.5"],
            "--seed must be an integer from 0 below 9223372036854775808 (got '0.5')",
        ),
        (["demo", "--duration", "-1"], "--duration"),
        (["config", "check", "--config"], "--config must be a path (got nothing)"),
        (["config", "check", "home.toml"], "argument must be --key value"),
        (["config", "check", "--generation.seed"], "--generation.seed must be given a value"),
        (["config", "check", "--confg"], "did you mean --config?"),
        (["config", "check", "--generation.seed", "x"], "generation.seed must be an integer from 0"),
        (["config", "check", "--generation.sed", "1"], "did you mean generation.seed?"),
        (["agent", "--preset", "exat"], "did you mean 'exact'?"),
        (["edge", "--config", "nowhere.toml"], "file must be a readable TOML file (got 'nowhere.toml'"),
        (
            ["cloud", "--cloud.threads", "-1"],
            "cloud.threads must be an integer from 0 up to 256 (got '-1' from flag --cloud.threads)",
        ),
        (["models", "info", "nowhere"], "nowhere"),
        (["models", "quantise", "a", "b", "--mode", "int3"], "weights-fp16"),
    ],
)
def test_a_mistake_is_one_helpful_line(arguments: list[str], expected: str) -> None:
    assert expected in refused(*arguments)


def test_malformed_toml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[broker]\nurl =\n", "utf-8")
    line = refused("agent", "--config", file)
    assert str(file) in line
    assert "line 2" in line


def test_an_absent_library_names_the_extra() -> None:
    with (
        pytest.raises(FedhlmError, match=r"'onnxruntime' is not installed: pip install 'fedhlm\[agent\]'"),
        needing("agent"),
    ):
        raise ModuleNotFoundError("No module named 'onnxruntime.capi'", name="onnxruntime.capi")
    with pytest.raises(ModuleNotFoundError), needing("agent"):
        raise ModuleNotFoundError("No module named 'edge_agent.nothing'", name="edge_agent.nothing")


@pytest.mark.parametrize(
    ("words", "library", "extra"),
    [
        ("agent --broker.url mqtt://127.0.0.1:1 --prompt x", "onnxruntime", "agent"),
        ("agent --broker.url mqtt://127.0.0.1:1 --prompt x", "tokenizers", "agent"),
        ("cloud --broker.url mqtt://127.0.0.1:1", "onnxruntime", "cloud"),
        ("cloud --broker.url mqtt://127.0.0.1:1 --federation.assign_s 60", "sklearn", "cloud"),
        ("demo", "tokenizers", "agent,edge,cloud"),
        ("pki init pki", "cryptography", "operator"),
        ("models export model out", "onnx", "models"),
    ],
)
def test_a_library_that_is_imported_late_is_named_all_the_same(
    words: str, library: str, extra: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; from fedhlm_fleet.cli import main; sys.exit(main({words.split()}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"fedhlm: '{library}' is not installed: pip install 'fedhlm[{extra}]'"
    assert "Traceback" not in done.stderr


# Dispatch, signals and pipes


@pytest.mark.parametrize(
    ("role", "module"),
    [("agent", "edge_agent.__main__"), ("edge", "edge_broker.__main__"), ("cloud", "cloud_verifier.__main__")],
)
def test_a_service_gets_the_merged_configuration_and_its_code_is_the_command_s(
    role: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Loaded] = []

    def main(loaded: Loaded, *_: object, **_door: object) -> int:
        given.append(loaded)
        return 7

    monkeypatch.setattr(f"{module}.main", main)
    assert cli.main([role, "--preset", "hlm", "--cluster.name", "barn"]) == 7
    assert given[0].config.cluster.name == "barn"
    assert given[0].config.generation.coupling == "full"


def test_an_interrupt_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "slow.toml"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [PROGRAM, "config", "check", "--config", pipe],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=obey_interrupts,  # noqa: PLW1509 - no threads here
    ) as process:
        # Opening for writing returns once the command has opened its end, so it is inside `config check` by then.
        writer = os.open(pipe, os.O_WRONLY)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        os.close(writer)
    assert process.returncode == 130
    assert stderr == ""


def test_a_reader_that_left_is_no_error_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [PROGRAM, "config", "check"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""
