"""Rules of every test run: a clean environment, each broker a test can ask for, and the rule on skips."""

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from edge_broker.embedded import EmbeddedBroker
from fedhlm import telemetry
from fedhlm.config import ENV_PREFIX
from tests.brokers import MOSQUITTO, Mosquitto

pytest_plugins = ("tests.skips",)

# A busy machine must not fail a property, and the same commit must give the same CI result.
settings.register_profile(
    "fedhlm",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fedhlm")


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
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    telemetry.forget_warnings()
    root.setLevel(level)
    for handler in root.handlers[:]:
        # A part that a test has run in this process logs to a stream that closes with the test. Those of pytest stay.
        if type(handler) is logging.StreamHandler and handler not in handlers:
            root.removeHandler(handler)
