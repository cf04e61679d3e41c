"""Rules of every test run: a clean environment, skips only where they are honest, none but listed ones in CI."""

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

from edge_broker.embedded import EmbeddedBroker
from fedhlm import telemetry
from fedhlm.config import ENV_PREFIX
from tests.brokers import MOSQUITTO, Mosquitto

# Where CI=true, a test may be skipped only for a reason that begins with one of these: what no machine can install.
ALLOWED_SKIPS: Final = ("no CUDA device",)
# What a skip for an absent program says before " is not installed"; .ci/packages names the package of each.
_ABSENT: Final = re.compile(r"(\S+) is not installed")
_MODELS: Final = re.compile(r"\b(torch|transformers|optimum|onnx)\b")

# A busy machine must not fail a property, and the same commit must give the same CI result.
settings.register_profile(
    "fedhlm",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fedhlm")

Report = pytest.TestReport | pytest.CollectReport


@pytest.fixture(params=["mosquitto", "embedded"])
def broker(request: pytest.FixtureRequest) -> Mosquitto | EmbeddedBroker:
    """Each broker that a fleet can run on, to be entered by the test."""
    if request.param == "embedded":
        return EmbeddedBroker()
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    return Mosquitto()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the caller's configuration reaches a test, nothing remembered crosses from one to the next."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    telemetry.forget_warnings()
    yield
    telemetry.forget_warnings()


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
