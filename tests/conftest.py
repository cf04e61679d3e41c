"""Rules of every test run: a clean environment, skips only where they are honest, none but listed ones in CI."""

import importlib.util
import os
from collections.abc import Generator, Iterator
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

from fedhlm import telemetry
from fedhlm.config import ENV_PREFIX

# Where CI=true, a test may be skipped only for a reason that begins with one of these: what no machine can install.
ALLOWED_SKIPS: Final = ("no CUDA device",)

# A busy machine must not fail a property, and the same commit must give the same CI result.
settings.register_profile(
    "fedhlm",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fedhlm")

Report = pytest.TestReport | pytest.CollectReport


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


def refuse_skip(report: Report) -> None:
    """Fail a report that was skipped where CI=true for a reason that is not allowed."""
    if os.environ.get("CI") != "true" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and CI allows no skip for: {reason}"
