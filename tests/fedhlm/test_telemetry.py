"""Properties of logs, counters and gauges: one line, no secret, named counts that only rise, metrics over HTTP."""

import asyncio
import io
import json
import logging
import math
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.result import GenerationResult
from fedhlm.config import load
from fedhlm.metrics import COUNTERS, GAUGES, LABELS
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Telemetry
from fedhlm.telemetry import (
    FORMATS,
    MESSAGE_MAX,
    WARNED_MAX,
    Counters,
    configure_logging,
    warn_once,
)
from fedhlm_lab.sim.toy import CONTEXT, pair
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from fedhlm_lab.studies.compare import StudyTask, work

PLAIN = sorted(set(COUNTERS) - set(LABELS))


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """A logger below a root that is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield logging.getLogger("fedhlm.somewhere")
    root.handlers[:] = handlers
    root.setLevel(level)


# Logs


def test_a_record_is_one_line_with_level_party_and_logger(log: logging.Logger) -> None:
    stream = io.StringIO()
    configure_logging("INFO", "porch", stream=stream)
    log.info("broker %s is back", "b1")
    log.debug("unseen")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("INFO    porch fedhlm.somewhere: broker b1 is back")


def test_a_line_break_from_outside_starts_no_new_record(log: logging.Logger) -> None:
    stream = io.StringIO()
    configure_logging("INFO", "porch", stream=stream)
    log.warning("refused %s", "x\n2026-01-01 ERROR forged\r\n")
    assert stream.getvalue().count("\n") == 1
    assert "\r" not in stream.getvalue()


def test_a_secret_is_replaced_in_message_and_traceback(log: logging.Logger) -> None:
    stream = io.StringIO()
    configure_logging("INFO", "porch", secrets=["hunter2", ""], stream=stream)
    try:
        raise ValueError("login hunter2 refused")
    except ValueError:
        log.exception("connecting with %s failed", "hunter2")
    assert "hunter2" not in stream.getvalue()
    assert "connecting with *** failed" in stream.getvalue()
    assert "ValueError: login *** refused" in stream.getvalue()


def test_records_as_json_are_one_object_a_line_without_secrets(log: logging.Logger) -> None:
    stream = io.StringIO()
    configure_logging("INFO", "porch", secrets=["hunter2"], form="json", stream=stream)
    log.info("broker %s is back", "b1\n{")
    log.warning("x" * 2 * MESSAGE_MAX)
    try:
        raise ValueError("login hunter2 refused")
    except ValueError:
        log.exception("connecting with %s failed", "hunter2")
    plain, long, failed = map(json.loads, stream.getvalue().splitlines())
    assert list(plain) == ["time", "level", "party", "logger", "message"]
    assert [*plain.values()][1:] == ["INFO", "porch", "fedhlm.somewhere", "broker b1\n{ is back"]
    assert datetime.fromisoformat(plain["time"]).utcoffset() == timedelta(0)
    assert len(long["message"]) < MESSAGE_MAX + 40
    assert failed["message"] == "connecting with *** failed"
    assert failed["traceback"].startswith("Traceback")
    assert failed["traceback"].endswith("ValueError: login *** refused")
    assert set(FORMATS) == set(get_args(get_args(get_type_hints(Telemetry, include_extras=True)["log_format"])[0]))


def test_configuring_again_replaces_the_handler(log: logging.Logger) -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("INFO", "porch", stream=first)
    configure_logging("WARNING", "porch", stream=second)
    log.warning("once")
    log.info("unseen")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
    assert "unseen" not in second.getvalue()


def test_a_warning_repeats_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fedhlm.once")
    with caplog.at_level(logging.DEBUG):
        for number in range(3):
            warn_once(logger, "full", "queue full at %d", number)
        warn_once(logger, "other", "another")
        warn_once(logging.getLogger("fedhlm.twice"), "full", "elsewhere")
    levels = [(record.getMessage(), record.levelname) for record in caplog.records]
    assert levels == [
        ("queue full at 0", "WARNING"),
        ("queue full at 1", "DEBUG"),
        ("queue full at 2", "DEBUG"),
        ("another", "WARNING"),
        ("elsewhere", "WARNING"),
    ]


def test_keys_made_up_by_strangers_cannot_fill_log_and_memory(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fedhlm.flood")
    with caplog.at_level(logging.WARNING):
        for number in range(WARNED_MAX + 50):
            warn_once(logger, f"stranger {number}", "who is %d", number)
    assert len(caplog.records) == WARNED_MAX


# Counters


@given(st.lists(st.tuples(st.sampled_from(PLAIN), st.integers(0, 1_000))))
def test_counts_are_the_sums_of_what_was_added(added: list[tuple[str, int]]) -> None:
    counters = Counters()
    for name, amount in added:
        counters.add(name, amount)
    for name in PLAIN:
        assert counters[name] == sum(amount for known, amount in added if known == name)
    assert counters.snapshot() == {name: counters[name] for name in {name for name, _ in added}}


def test_labels_are_counted_apart_and_together() -> None:
    counters = Counters()
    counters.add("tokens_by_source", 3, label="cloud")
    counters.add("tokens_by_source", label="local")
    assert counters.by_label("tokens_by_source") == {"cloud": 3, "local": 1}
    assert counters["tokens_by_source"] == 4
    assert counters.snapshot() == {"tokens_by_source.cloud": 3, "tokens_by_source.local": 1}


def test_a_count_never_falls_and_has_a_known_name_and_the_right_label() -> None:
    counters = Counters()
    with pytest.raises(ValueError, match="never fall"):
        counters.add("retries", -1)
    with pytest.raises(KeyError):
        counters.add("retrys")
    with pytest.raises(KeyError):
        counters["retrys"]
    with pytest.raises(ValueError, match="without a label"):
        counters.add("retries", label="cloud")
    with pytest.raises(ValueError, match="with a label"):
        counters.add("tokens_by_source")
    assert counters.snapshot() == {}


class Part:
    """A part that counts for itself."""

    lost = 0
    late = 0


def test_what_a_part_counts_for_itself_is_read_when_it_is_asked_for() -> None:
    counters, one, two = Counters(), Part(), Part()
    counters.add("retries", 5)
    for part in (one, two, one):  # the same part twice counts once
        counters.follow(part, retries="lost", evictions="late")
    assert counters.snapshot() == {"retries": 5}
    one.lost, two.lost, two.late = 3, 4, 2
    assert counters["retries"] == 12
    assert counters.snapshot() == {"retries": 12, "evictions": 2}


def test_only_what_is_there_can_be_followed() -> None:
    counters = Counters()
    with pytest.raises(AttributeError):
        counters.follow(Part(), retries="lsot")
    for name in ("retrys", "tokens_by_source", "tau"):
        with pytest.raises(KeyError):
            counters.follow(Part(), **{name: "lost"})
    assert counters.snapshot() == {}


def test_no_addition_is_lost_between_threads() -> None:
    counters = Counters()

    def add_many() -> None:
        for _ in range(2_000):
            counters.add("retries")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=add_many, name=f"adder {number}") for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert counters["retries"] == 8_000


# Gauges


@given(st.lists(st.tuples(st.sampled_from(sorted(GAUGES)), st.floats(allow_nan=False, allow_infinity=False))))
def test_a_gauge_has_its_newest_value_and_none_before_it_is_set(values: list[tuple[str, float]]) -> None:
    counters = Counters()
    counters.add("retries")
    for name, value in values:
        counters.set(name, value)
    assert counters.gauges() == dict(values)
    assert counters.snapshot() == {"retries": 1, **dict(values)}


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(-1.0, 1.0))
def test_a_gauge_has_a_known_name_and_keeps_its_value_when_a_new_one_is_not_finite(wrong: float, value: float) -> None:
    counters = Counters()
    counters.set("tau", value)
    with pytest.raises(ValueError, match="gauge tau must be a finite number"):
        counters.set("tau", wrong)
    for name in ("tua", "retries"):
        with pytest.raises(KeyError):
            counters.set(name, value)
    with pytest.raises(KeyError):
        counters.add("tau")
    assert counters.snapshot() == {"tau": value}


def test_counters_and_gauges_never_share_a_name() -> None:
    exposed = [f"{name}_total" for name in COUNTERS] + list(GAUGES)
    assert len({*exposed, *COUNTERS}) == len(exposed) + len(COUNTERS)


def test_an_agent_shows_the_thresholds_and_the_budget_of_its_newest_generation() -> None:
    async def main() -> tuple[list[dict[str, float]], list[GenerationResult]]:
        fleet = Fleet(pair(0.8), seed=3, clusters=1, delay_s=0.01, sessions_max=4)
        for node in fleet.nodes.values():
            node.start()
        await asyncio.sleep(1.0)
        shown, done = [], []
        async with fleet.online("c0", "porch", fleet.pair.drafter()) as agent:
            for preset in ("u-hlm", "budget", "fedhlm", "slm-only"):
                config = load(preset=preset, environ={}).config
                task = StudyTask([7, 8, 9], Sampling(5), 8, "")
                done += [d.result for d in await work(agent, config, iter([task]), fleet.pair.eos_ids, CONTEXT)]
                shown.append(fleet.counters.gauges())
        for node in fleet.nodes.values():
            await node.crash()
        return shown, done

    (u_hlm, budget, fedhlm, slm_only), (first, audited, peers, last) = run_virtual(main())
    assert u_hlm == {"tau": first.tau}
    known = audited.certificate
    assert known is not None
    risk = {
        "risk": known.estimate,
        "risk_limit": known.limit(0.95),
        "risk_generations": known.texts,
        "risk_budget": 0.05,
    }
    assert budget == {"tau": audited.tau, **risk}
    assert fedhlm == {"tau": peers.tau, "similarity": peers.similarity, **risk}
    assert slm_only == {**fedhlm, "tau": last.tau}


def test_a_long_record_is_cut(log: logging.Logger) -> None:
    """The name of a topic may have 65,535 bytes, and there may be thousands of them."""
    stream = io.StringIO()
    configure_logging("INFO", "porch", stream=stream)
    log.warning("refused a message on %s", "x" * 60_000)
    assert len(stream.getvalue()) < MESSAGE_MAX + 40
    assert "characters)" in stream.getvalue()


def test_of_a_warnings_key_little_is_remembered(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for ending in ("a", "b"):
            warn_once(log, "x" * 60_000 + ending, "again")
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG"]
