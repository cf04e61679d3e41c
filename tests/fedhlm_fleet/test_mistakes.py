"""Whatever is typed wrong, in any command, ends in one line that says what must be, or what was meant."""

import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from fedhlm_fleet import cli
from fedhlm_fleet.commands.mistakes import Between, sentence

GOLDEN = Path(__file__).parents[1] / "golden" / "exact.trace"
HUGE = "9" * 30
# Files of a folder in which everything is typed; `good.trace` is a recording.
FILES = {
    "empty": b"",
    "bytes": b"caf\xc3\x28\xff\n",
    "text": b"hello\n",
    "broken.toml": b"[broker\nurl = 1\n",
    "type.toml": b"[generation]\nmax_tokens = 'many'\n",
    "list.toml": b"[generation]\nmax_tokens = [3]\n",
    "nan.toml": b"[generation]\ntemperature = nan\n",
    "negative.toml": b"[broker]\nconnect_timeout_s = -1\n",
    "scalar.toml": b"generation = 3\n",
    "key.toml": b"[generation]\nmax_token = 3\n",
    "section.toml": b"[generatoin]\nseed = 3\n",
    "twice.toml": b"[broker]\nurl = 'a'\nurl = 'b'\n",
    "x.pem": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "news.jsonl": b'{"title": 1}\n',
    "cards.csv": b"agnt\nporch\n",
    "link.toml": b"delay_s = 'x'\n",
}
# Commands that take every configuration key.
KEYED = (
    "agent --prompt x",
    "edge",
    "cloud",
    "config check",
    "record --out new",
    "status",
    "federation list",
    "ask porch x",
)
CONFIGS = (
    ("nowhere.toml", "file must be a readable TOML file (got 'nowhere.toml': No such file or directory)"),
    ("folder", "file must be a readable TOML file (got 'folder': Is a directory)"),
    ("bytes", "file must be TOML (got 'bytes': 'utf-8' codec can't decode"),
    ("broken.toml", "file must be TOML (got 'broken.toml': Expected ']'"),
    ("type.toml", "generation.max_tokens must be an integer from 1 up to 65536 (got 'many' from file type.toml)"),
    ("list.toml", "generation.max_tokens must be an integer from 1 up to 65536 (got [3]"),
    ("nan.toml", "generation.temperature must be a number from 0 up to 10 (got nan"),
    ("negative.toml", "broker.connect_timeout_s must be a number above 0 up to 3600 (got -1"),
    ("scalar.toml", "generation must be a section of keys, not a value (got 3 from file scalar.toml)"),
    ("key.toml", "generation.max_token is not a known key: did you mean generation.max_tokens?"),
    ("section.toml", "generatoin is not a known key: did you mean generation?"),
    ("twice.toml", "file must be TOML (got 'twice.toml': Cannot overwrite a value"),
)
FLAGS = (
    ("--broker.url http://x", "broker.url must be mqtt://"),
    ("--broker.url mqtt://127.0.0.1:99999", "the port an integer in 1..65535"),
    (f"--broker.url mqtt://{'a' * 300}", "the host a name or an address"),
    ("--broker.url 'mqtt://a b'", "the host a name or an address"),
    ("--broker.url mqtts://127.0.0.1:1 --broker.cert nowhere", "broker.url must be given cert and key together"),
    (f"--generation.max_tokens {HUGE}", "generation.max_tokens must be an integer from 1 up to 65536"),
    ("--generation.max_tokens ''", "generation.max_tokens must be an integer from 1 up to 65536 (got ''"),
    ("--generation.seed -1", "generation.seed must be an integer from 0"),
    ("--generation.gate sometimes", "generation.gate must be one of"),
    ("--generation 3", ""),
    ("--genration.seed 3", "did you mean generation.seed?"),
    ("--broker.password secret", "broker.password must be set by FEDHLM_BROKER__PASSWORD or a file"),
    ("--cofnig x.toml", "did you mean --config?"),
    ("--config", "--config must be a path (got nothing)"),
    ("--generation.seed", ""),
)
ENVIRONS = (
    ("FEDHLM_GENERATION__SEED=x", "generation.seed must be an integer from 0"),
    ("FEDHLM_GENERATION__SED=3", "did you mean FEDHLM_GENERATION__SEED?"),
    ("FEDHLM_PRESET=exakt", "did you mean 'exact'?"),
)
NUMBERS = (("x", "x"), (HUGE, "huge"), ("-1", "negative"), ("nan", "nan"), ("''", "empty"))
COUNTED = (  # options that are counts or spans, with what they must be
    ("demo --tokens", "an integer from 1 up to 65536"),
    ("demo --seed", "an integer from 0 below 9223372036854775808"),
    ("demo --duration", "a number above 0"),
    ("demo --alpha", "a number above 0"),
    ("demo --budget", "a number above 0 up to 1"),
    ("demo --temperature", "a number from 0 up to 10"),
    ("ask porch x --tokens", "an integer from 1 up to 65536"),
    ("ask porch x --wait", "a number above 0"),
    ("record --out new --duration", "a number above 0"),
    ("replay good.trace --from", "a number of at least 0"),
    ("trace show good.trace --until", "a number above 0"),
    ("simulate --agents", "an integer from 1 up to 10000"),
    ("simulate --jobs", "an integer from 1 up to 1024"),
    ("lab coverage --lives", "an integer from 1 up to 1000000"),
    ("lab liars --members", "an integer from 2 up to 1024"),
    ("models evaluate folder --articles", "an integer from 1 up to 1000000"),
    ("pki init new --days", "an integer from 1 up to 36500"),
)
DEVICE = "--agent porch --broker mqtts://b --cluster home"
OTHERS = (
    ("demoo", "'demoo' is not a command of fedhlm: did you mean demo?"),
    ("xyzzy", "'xyzzy' is not a command of fedhlm: fedhlm --help lists them"),
    ("--vrsion", "did you mean --version?"),
    ("trace shwo good.trace", "'shwo' is not a command of fedhlm trace: did you mean show?"),
    ("demo --durtion 3", "'--durtion' is not an option of fedhlm demo: did you mean --duration?"),
    ("demo --duration", "--duration must be a number above 0 (got nothing)"),
    ("demo --tokens 3 --tokens 4", "--tokens must be given once (got a second '4')"),
    ("demo extra", "fedhlm demo must be given no further argument (got 'extra')"),
    ("demo --json nowhere/x", "--json must be a writable file (got 'nowhere/x': No such file or directory)"),
    ("demo --json folder", "--json must be a writable file (got 'folder': Is a directory)"),
    ("demo --prompts nowhere.txt", "--prompts must be a readable UTF-8 text file (got 'nowhere.txt'"),
    ("demo --prompts bytes", "--prompts must be a readable UTF-8 text file (got 'bytes'"),
    ("demo --prompts empty", "--prompts must be at least one line of text (got 'empty')"),
    ("demo --prompts news.jsonl", "news.jsonl line 1 must be a news item with title, text and topic"),
    ("demo --prompts nowhere.jsonl", "prompt file must be readable (got 'nowhere.jsonl': No such file"),
    ("demo --record text", "--record must be a new file in an existing folder (got 'text')"),
    ("ask", "fedhlm ask must be followed by AGENT TEXT"),
    ("ask porch x --tokns 3", "--tokns is not an option of fedhlm ask: did you mean --tokens?"),
    ("ask a/b x", "agent must be 1 to 64 letters"),
    ("record", "--out must be a path (got nothing)"),
    ("record --out ''", "must be a new file"),
    ("record --out text", "text must be a new file (it exists already)"),
    ("record --out nowhere/x", "must be in a folder that exists (got 'nowhere')"),
    ("record --out new --rotate x", "--rotate must be a size such as"),
    ("replay nowhere.trace --check all", "nowhere.trace"),
    ("replay folder --check all", "folder"),
    ("replay text --check all", "text must be a recording of format fedhlm-trace/1"),
    ("replay good.trace --check agnt", "--check must be one of agent, edge, cloud, all, did you mean 'agent'? (got 'agnt')"),
    ("replay good.trace --check all --update text", "text must be a new file (it exists already)"),
    ("replay good.trace --check all --loop", "--loop must be left out with --check"),
    ("replay good.trace --broker mqtt://127.0.0.1:1 --speed nan", "--speed must be 1, another number above 0, or max (got 'nan')"),
    ("trace show", "FILE must be a path (got nothing)"),
    ("trace show good.trace --root '#'", "broker.root must be topic levels"),
    ("trace export good.trace --format xml", "--format must be one of jsonl, csv (got 'xml')"),
    ("trace export good.trace --out text", "text must be a new file"),
    ("trace cut good.trace text", "text must be a new file"),
    ("simulate --seeds 5..1", "--seeds must be a seed from 0 below 9223372036854775808, or A..B with A at most B"),
    (f"simulate --seeds 0..{HUGE}", "--seeds must be a seed from 0 below"),
    ("simulate --faults drp", "drp"),
    ("simulate --link link.toml", "delay_s"),
    ("simulate --out text --seeds 0", "--out must be a writable folder (got 'text': text is none)"),
    ("simulate --json folder --seeds 0", "--json must be a writable file (got 'folder': Is a directory)"),
    ("lab liars --members", "--members must be an integer from 2 up to 1024 (got nothing)"),
    ("lab liars --lies loud", "--lies must be one of"),
    ("lab coverage --json nowhere/x", "--json must be a writable file (got 'nowhere/x': No such file or directory)"),
    ("lab coverage --saved folder", "--saved must be a writable file (got 'folder': Is a directory)"),
    ("lab coverage --lives 1 --texts 1 --saved text", "--saved must be a file of lives (got 'text': "),
    ("models quantise folder new --mode int4", "--mode must be one of int8-dynamic, weights-int8, weights-fp16"),
    ("pki issue porch --pki nowhere", "nowhere"),
    ("pki init text", "text"),
    ("flash --csv cards.csv --image text", "did you mean"),
    (f"flash --image nowhere {DEVICE}", "cannot read nowhere: No such file or directory"),
    (f"flash --image text {DEVICE}", "text must be an image of Raspberry Pi OS"),
    (f"flash --boot nowhere {DEVICE}", "--boot must be the folder of a mounted boot partition (got 'nowhere')"),
    (f"flash --image text {DEVICE} --ssh-key nowhere", "cannot read nowhere"),
    ("models evaluate nowhere", "folder must be an existing folder (got 'nowhere')"),
    ("models release nowhere new", "folder must be an existing folder (got 'nowhere')"),
    ("models train text", "RUNS must be a folder, or the name of a new one (got 'text')"),
    ("completion --shell tcsh", "--shell must be one of"),
    ("config explain generation.budgt", "did you mean generation.budget?"),
    ("config explain --cofnig", "did you mean --config?"),
    ("provision shs", "'shs' is not a command of fedhlm provision: did you mean ssh?"),
    ("federation forget a/b", "agent must be 1 to 64 letters"),
)  # fmt: skip
DEAD = (  # no broker is there
    "agent --prompt x", "record --out new", "replay good.trace", "status", "federation list", "federation forget porch",
    "ask porch x",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is typed in a folder with FILES; the log's handlers are put back."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.trace").symlink_to(GOLDEN)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FEDHLM_")]:
        monkeypatch.delenv(name)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before, level


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command must print before it fails."""
    code = cli.main(shlex.split(command))
    told = capsys.readouterr()
    assert code in (1, 2), told
    lines = told.err.splitlines()
    assert len(lines) == 1, told.err
    assert lines[0].startswith("fedhlm: ")
    assert re.search(r"must (be|have)|did you mean|is not a|not reached|cannot|--help lists|makes a CA", lines[0]), (
        lines[0]
    )
    return lines[0]


@pytest.mark.parametrize("command", KEYED)
def test_a_file_flag_or_variable_that_cannot_be_used_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in CONFIGS:
        assert words in typed(f"{command} --config {name}", capsys)
    for flags, words in FLAGS:
        assert words in typed(f"{command} {flags}", capsys)
    for pair, words in ENVIRONS:
        with pytest.MonkeyPatch.context() as environ:
            environ.setenv(*pair.split("=", 1))
            assert words in typed(command, capsys)


@pytest.mark.parametrize("option", [option for option, _ in COUNTED])
def test_a_number_that_is_none_or_out_of_range_is_told_what_it_must_be(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, must = option.rsplit(maxsplit=1)[-1], dict(COUNTED)[option]
    bounded = " up to " in must or " below " in must
    for value, kind in NUMBERS:
        if kind == "huge" and not bounded:
            continue
        line = typed(f"{option}={value}", capsys)
        assert line == f"fedhlm: {flag} must be {must} (got {''.join(shlex.split(value))!r})"


@pytest.mark.parametrize(("command", "words"), OTHERS, ids=[command for command, _ in OTHERS])
def test_a_mistake_is_one_line(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in typed(command, capsys)


@pytest.mark.parametrize("command", DEAD)
def test_a_broker_that_is_not_there_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = typed(f"{command} --broker.url mqtt://127.0.0.1:1 --broker.connect_timeout_s 1", capsys)
    assert "broker mqtt://127.0.0.1:1 not reached within 1 s: [Errno 111] Connection refused" in line


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Between(gte=1), "of at least 1"),
        (Between(gt=0), "above 0"),
        (Between(gte=0, lte=10), "from 0 up to 10"),
        (Between(gt=0, lt=1), "above 0 below 1"),
    ],
)
def test_limits_are_told_and_nothing_infinite_is_within(limits: Between, words: str) -> None:
    assert limits.words == words
    for value in (float("nan"), float("inf"), float("-inf"), -1.0):
        with pytest.raises(ValueError, match=words):
            limits(float, value)
    limits(float, None)
    limits(float, 0.5 if limits.gte != 1 else 1.5)


def test_what_is_not_known_is_told_as_it_is() -> None:
    assert sentence(CycloptsError("something new")) == "something new"
