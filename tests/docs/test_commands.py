"""Every command of README and docs is typed as it stands, page by page and in order, with the program as pip installs it.

Compared are exit statuses, files that a page makes, and what a command must print. The tutorial and CONTRIBUTING.md have
tests of their own.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests import installed
from tests.brokers import free_port
from tests.docs.commands import REASONS, Step, steps, terminals

ROOT: Final = Path(__file__).parents[2]
ELSEWHERE: Final = {"docs/tutorial.md": "test_tutorial.py"}
PAGES: Final = sorted(
    name
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    if (name := str(path.relative_to(ROOT))) not in ELSEWHERE and list(steps(path.read_text("utf-8")))
)
# What a page's commands are typed with: the same kind of work, less of it.
SHORTER: Final = {
    "--seeds 0..99 ": "--seeds 0..2 ",
    "--seeds 0..999 ": "--seeds 0..2 ",
    "fedhlm simulate   ": "fedhlm simulate --seeds 0..2   ",
    "fedhlm simulate --faults": "fedhlm simulate --seeds 0..2 --faults",
    "--duration 60": "--duration 3",
}
DEMO: Final = re.compile(r"(?:make|fedhlm) demo ")
BROKER: Final = re.compile(r"mqtt://[\w.]+:1883")
API: Final = re.compile(r"(?<=127\.0\.0\.1:)1143[45]\b")


SHOWN: Final = "as docs/configuration.md shows it"
GOLDEN: Final = "tests/golden/fedhlm.trace"
SMALL: Final = "tests/golden/exact.trace"  # where every decision is checked, which takes longer than to read them


class Kit(NamedTuple):
    """What a page needs: a clone of the repository, a fleet (parts that run), files; and what it must make and show."""

    clone: bool = False
    fleet: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    made: tuple[str, ...] = ()
    shows: tuple[tuple[str, str], ...] = ()


# Everything that a page's commands take for granted is here; a page that is not named needs nothing.
TITLES: Final = "\n".join(f"Oil prices rise for the {count}th time" for count in range(20)) + "\n"
FLEET: Final = ("edge", "cloud", "agent")
KITS: Final = {
    "README.md": Kit(
        clone=True,
        made=("monday.trace", ".venv/bin/fedhlm"),
        shows=(
            ("make demo", r"tokens +\d+: "),
            ("fedhlm ask", r"\w+ \w+"),
            ("curl", r'"verified":true'),
            ("fedhlm trace show", r"drafted u=\.\d"),
            ("fedhlm replay", r"all the same|\d+ decisions"),
            ("fedhlm simulate", r"seed"),
        ),
    ),
    "docs/quickstart.md": Kit(clone=True, shows=(("fedhlm agent", r"\w+ \w+"),)),
    "docs/demo.md": Kit(
        clone=True,
        fleet=("edge",),
        files=(("titles.txt", TITLES), ("mine.toml", SHOWN)),
        made=("result.json",),
        shows=(("make demo", r"tokens +\d+: "),),
    ),
    "docs/security.md": Kit(
        made=("pki/ca.crt", "broker-home/mosquitto.conf", "broker-home/broker.key", "broker-home/acl"),
        shows=(("fedhlm pki issue porch", r"broker\.key"),),
    ),
    "docs/devices.md": Kit(
        files=(("cards.csv", "agent\nporch\n"),),
        made=("pki/ca.crt", "mosquitto/mosquitto.conf", "mosquitto/broker.key", "mosquitto/acl"),
    ),
    "docs/configuration.md": Kit(
        fleet=("edge", "cloud"),
        files=(("agent.toml", SHOWN), ("mine.toml", SHOWN)),
        shows=(
            ("fedhlm config check", r"generation\.budget +0\.02 .*mine\.toml"),
            ("fedhlm agent --config agent.toml --prompt", r"\w+ \w+"),
        ),
    ),
    "docs/api.md": Kit(
        fleet=("edge",),
        made=("answer.json",),
        shows=(
            ("curl http://127.0.0.1:11434/v1/chat", r'"object":"chat\.completion"'),
            ("curl http://127.0.0.1:11434/v1/completions", r'"text":" (World|Business)"'),
            ("fedhlm verify-receipt", r"16 of 16 tokens are the LLM.s own"),
        ),
    ),
    "docs/checking.md": Kit(
        fleet=("edge",),
        files=(("porch.toml", '[agent]\nid = "porch"\n'), ("monday.trace", SMALL), ("traces/monday.trace", SMALL)),
        made=("tuesday.trace",),
        shows=(("fedhlm replay monday.trace", r"\d+ decisions"),),
    ),
    "docs/compose.md": Kit(clone=True, made=(".env",)),
    "docs/console.md": Kit(
        fleet=("edge",), files=(("monday.trace", SMALL),), shows=(("fedhlm top", r"1 of 1 parts online"),)
    ),
    "docs/doctor.md": Kit(fleet=FLEET),
    "docs/recordings.md": Kit(fleet=("edge",), made=("monday.trace",), shows=(("fedhlm record", r"messages +[\d,]+"),)),
    "docs/simulator.md": Kit(shows=(("fedhlm simulate", r"seeds +3, failed 0"),)),
    "docs/traces.md": Kit(
        fleet=("edge",),
        files=(("paper.trace", GOLDEN),),
        made=("again.trace", "run.trace"),
        shows=(("fedhlm trace show paper.trace --story", r"drafted u="), ("fedhlm trace stats", r"verdict latency")),
    ),
}


def shown(name: str) -> str:
    """The lines of a file that docs/configuration.md shows, whose first line is its name."""
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    found = re.search(rf"^    # {re.escape(name)}\n((?:    .*\n|\n)*?)(?=    \$|\S)", page, re.MULTILINE)
    assert found is not None, name
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE)


@pytest.fixture(scope="module")
def cloned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of this tree has: tracked files, and new ones that git does not ignore. Its pages share it."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def typed(command: str, port: int, apis: Mapping[str, int]) -> str:
    """A command as it is typed here: less work, and a broker and APIs on ports of this test's own."""
    command = API.sub(lambda found: str(apis[found[0]]), command)
    if DEMO.match(f"{command} "):
        # Most of a demo's time goes into the texts that every preset and both models write to be compared.
        command = re.sub(r"\s+#.*", "", command)
        command = re.sub(r' ARGS="(.*)"', r" \1", re.sub(r" --(?:duration|tokens) \d+", "", command))
        program, words = command.split()[0], " ".join(["--duration 1 --tokens 4", *command.split()[2:]])
        command = f'make demo ARGS="{words}"' if program == "make" else f"fedhlm demo {words}"
    for long, short in SHORTER.items():
        whole = f"{command} "
        if whole.startswith(long) or (long.startswith("-") and long in whole):
            command = whole.replace(long, short, 1).rstrip()
            break
    command = BROKER.sub(f"mqtt://127.0.0.1:{port}", command)
    if re.match(r"fedhlm +edge\b", command):
        command = command.replace("edge", f"edge --edge.embedded_port {port}", 1)
    return command.replace("mosquitto_sub ", f"mosquitto_sub -p {port} ")


def needed(step: Step) -> str:
    """The extras of a command that installs the program."""
    found = re.match(r"pip install '?\.(?:\[([\w,]+)\])?'? ", f"{step.command} ")
    assert found is not None, f"{step.command}: it is not on a package index, only in a clone"
    return found[1] or ""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_work_in_its_order(name: str, tmp_path: Path, cloned: Path) -> None:
    kit = KITS.get(name, Kit())
    found = list(steps((ROOT / name).read_text("utf-8")))
    run = [step for step in found if not step.left_out]
    if not run:
        return
    for program in ("curl", "jq", "mosquitto_sub"):
        if any(program in step.command for step in run) and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    extras = {needed(step) for step in run if step.command.startswith("pip ")}
    assert extras <= {"", "operator", "serve"}
    folder = cloned if kit.clone else tmp_path
    for path, text in kit.files:
        (folder / path).parent.mkdir(exist_ok=True)
        recorded = text in (GOLDEN, SMALL)
        source = (ROOT / text).read_bytes() if recorded else (shown(path) if text == SHOWN else text).encode()
        (folder / path).write_bytes(source)
    programs = folder / ".venv" / "bin" if kit.clone else installed.programs("operator", *(extras & {"serve"}))
    port, apis = free_port(), {"11434": free_port(), "11435": free_port()}
    environ = (
        installed.environ(programs, FEDHLM_BROKER__URL=f"mqtt://127.0.0.1:{port}")
        if kit.fleet
        else installed.environ(programs)
    )
    shows = dict(kit.shows)
    with terminals(folder, environ) as terminal:
        for part in kit.fleet:
            words = (
                f"--edge.embedded_port {port} --broker.url ''"
                if part == "edge"
                else f"--broker.url mqtt://127.0.0.1:{port}"
            )
            terminal.serve(f"fedhlm {part} {words} --cluster.name home")
        for step in run:
            command = typed(step.command, port, apis)
            if step.serves:
                terminal.serve(command)
                continue
            if command.startswith("pip "):  # done, from the wheel of this tree or by make
                continue
            terminal.close("mosquitto_sub")
            if " r6" in command:
                listed = terminal.type("fedhlm trace show paper.trace --story --agent agent-1b")
                command = command.replace(
                    " r6", f" {re.findall(r'^request (.+) to agent-1b', listed, re.MULTILINE)[-1]}"
                )
            told = terminal.type(command)
            for begins in [begins for begins in shows if step.command.startswith(begins)]:
                assert re.search(shows[begins], told), f"{command}\n{told[-2_000:]}"
    assert {begins for begins in shows if not any(step.command.startswith(begins) for step in run)} == set()
    assert [path for path in kit.made if not (folder / path).exists()] == []


@pytest.mark.parametrize(
    ("command", "less"),
    [
        ("make demo      # about a minute", 'make demo ARGS="--duration 1 --tokens 4"'),
        ('make demo ARGS="--preset u-hlm --tokens 32"', 'make demo ARGS="--duration 1 --tokens 4 --preset u-hlm"'),
        ("fedhlm demo --record a --duration 60", "fedhlm demo --duration 1 --tokens 4 --record a"),
        ("fedhlm record --out a --duration 60", "fedhlm record --out a --duration 3"),
        ("fedhlm demonstrate", "fedhlm demonstrate"),
    ],
)
def test_demos_are_typed_with_less_work(command: str, less: str) -> None:
    assert typed(command, 1, {}) == less


def test_pages_that_are_described_have_commands() -> None:
    assert KITS.keys() <= set(PAGES)
    assert len(PAGES) > 15


def test_what_is_left_out_has_one_of_the_listed_reasons() -> None:
    found = {step.left_out for name in PAGES for step in steps((ROOT / name).read_text("utf-8"))}
    assert found - {""} == set(REASONS)


def test_a_mark_holds_in_its_section_and_below() -> None:
    page = """# Title
<!-- not run here: `pip`: at all -->

## A
<!-- not run here: `git b`: no time; `git c`: no wish -->

    $ git a 1
    $ git b 2 \\
        3
### B
    git c 4  # one's
    git d '{
      5}'
    sentence

## C
    git b 5
    pip 6
"""
    expected = [
        ("git a 1", ""), ("git b 2 3", "no time"), ("git c 4  # one's", "no wish"), ("git d '{\n5}'", ""), ("git b 5", ""), ("pip 6", "at all"),
    ]  # fmt: skip
    assert list(steps(page)) == expected
