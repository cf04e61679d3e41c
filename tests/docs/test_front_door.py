"""The repository's front door: short, true, and its lines of Python run against a live fleet."""

import asyncio
import importlib
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm.version import __version__
from tests.integration.live import live

yaml: Any = importlib.import_module("yaml")  # comes with the site's tools

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/quickstart.md", "docs/models.md", "docs/demo.md", "docs/operations.md")


def parsed(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def test_the_readme_is_short_and_its_prose_fits_a_screen() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "    "))]


def test_the_readme_shows_what_a_visitor_looks_for() -> None:
    assert README.index("make demo") < README.index("docs/assets/demo.svg") < README.index("fedhlm.Client")
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / link).is_file(), link


def test_the_figures_of_the_readme_stand_in_the_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text("utf-8")
    rows = re.findall(r"^\| `?([\w-]+)[^|]*\|((?:[^|\n]*\d[^|\n]*\|){4})$", README, re.MULTILINE)
    assert len(rows) == 7
    for name, cells in rows:
        values = [cell.strip() for cell in cells.strip("|").split("|")]
        assert any(all(f"| {v} |" in line for v in values) for line in results.splitlines() if name in line), name


@pytest.mark.slow
async def test_the_lines_of_python_write_a_text(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code) == 1
    program = tmp_path / "ask.py"
    async with EmbeddedBroker() as broker:
        program.write_text(code[0].replace("mqtt://localhost:1883", broker.url), "utf-8")
        async with live(broker.url):
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(program), env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, errors = await asyncio.wait_for(process.communicate(), 120.0)
    assert process.returncode == 0, errors.decode()
    text, last = out.decode().rstrip().rsplit("\n", 1)
    assert len(text) > 40
    assert last == "0 tokens never left the device"  # under `exact`


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_pages_name_exist(page: str) -> None:
    from fedhlm_fleet.cli import app

    text = (ROOT / page).read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    code = "\n".join(re.findall(r"^    .*$", prose, re.MULTILINE) + re.findall(r"`([^`\n]+)`", prose))
    assert "make" in code or "fedhlm" in code
    for target in re.findall(r"\bmake ([a-z][\w-]*)", code):
        assert target in targets, target
    for words in re.findall(r"\bfedhlm ([a-z]+)", code):
        assert words in app, words


def test_the_citation_is_of_this_version() -> None:
    citation = parsed("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])


def test_public_ci_runs_what_ci_runs() -> None:
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    assert "bash .ci/run" in [step.get("run") for step in jobs["whole"]["steps"]]
    assert "make docs" in [step.get("run") for step in jobs["docs"]["steps"]]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (installed,) = (step["run"] for step in jobs["newest"]["steps"] if "pip install" in step.get("run", ""))
    (named,) = re.findall(r"\.\[([\w,]+)\]", installed)
    assert set(named.split(",")) <= set(extras)


def test_hooks_and_templates_are_what_their_readers_expect() -> None:
    hooks = parsed(".pre-commit-config.yaml")["repos"][0]["hooks"]
    programs = {Path(hook["entry"].split()[0]).name for hook in hooks}
    assert programs == {"ruff", "lint-imports"}
    assert not [program for program in programs if not Path(sys.executable).with_name(program).exists()]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        template = parsed(str(form.relative_to(ROOT)))
        assert {"name", "description", "body"} <= template.keys(), form
        assert all(part["attributes"]["label"] for part in template["body"]), form
