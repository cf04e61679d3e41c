"""The rule on skips, a plugin of every test run: a skip names what is absent, and in CI only listed ones pass."""

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Final

import pytest

# Where CI=true, a test may be skipped only for a reason that begins with one of these: what no machine can install, and
# what takes too long to build (.ci/run installs it where pip has built it before), or cannot be installed beside the
# project.
ALLOWED_SKIPS: Final = (
    "no CUDA device",
    "needs llama.cpp",
    "needs SmolLM2",
    "no Python with flwr is named",
    "a slow link needs root",
)
# What a skip for an absent program says before " is not installed"; .ci/packages names the package of each.
_ABSENT: Final = re.compile(r"(\S+) is not installed")
_MODELS: Final = re.compile(r"\b(torch|transformers|optimum|onnx)\b")

Report = pytest.TestReport | pytest.CollectReport


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs torch where torch is not installed."""
    if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None:
        return
    for item in items:
        if item.get_closest_marker("torch"):
            item.add_marker(pytest.mark.skip(reason="needs torch: make models"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a refused skip of a test into a failure."""
    report = yield
    refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a refused skip of a whole module into an error."""
    report = yield
    refuse_skip(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was skipped, how often, and which command installs what was missing."""
    skipped = [report for report in terminalreporter.getreports("skipped") if isinstance(report, Report)]
    reasons = Counter(reason_of(report) for report in skipped)
    if not reasons:
        return
    terminalreporter.section("skipped")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason}")
    if command := remedy(reasons, config.rootpath / ".ci" / "packages"):
        terminalreporter.write_line(f"To run them as well: {command}")


def remedy(reasons: Iterable[str], table: Path) -> str:
    """The command line that installs all that these skips asked for; empty where nothing can be installed."""
    lines = table.read_text("utf-8").splitlines() if table.is_file() else []
    package_of = dict(line.split() for line in lines if not line.startswith("#"))
    found = {match[1] for reason in reasons if (match := _ABSENT.fullmatch(reason))}
    packages = sorted({package_of[program] for program in found if program in package_of})
    commands = [f"sudo apt-get install {' '.join(packages)}"] if packages else []
    commands += ["make models"] if any(_MODELS.search(reason) for reason in reasons) else []
    return " && ".join(commands)


def reason_of(report: Report) -> str:
    """Why a test or a module was skipped, in the words of who skipped it."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def refuse_skip(report: Report) -> None:
    """Fail a report that was skipped where CI=true for a reason that is not allowed."""
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = reason_of(report)
    if not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and CI allows no skip for: {reason}"
