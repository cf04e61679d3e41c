"""The benchmark of throughput: its slow link, its costs, and a short run over MQTT between two network namespaces."""

import csv
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm_lab.sim.links import LinkProfile
from fedhlm_lab.sim.pace import ModelPace

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "throughput"


def loaded(name: str) -> Any:
    """A file of the benchmark, which imports its neighbours by name."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


SLOW_LINK, BESIDE, PARTS = loaded("slow_link"), loaded("beside"), loaded("parts")
SIZES = st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(40, 1_400)), min_size=1, max_size=20)


@given(sizes=SIZES, jitter_ms=st.floats(0.0, 500.0))
def test_packets_arrive_in_order_after_the_delay_and_those_before_them(
    sizes: list[tuple[float, int]], jitter_ms: float
) -> None:
    profile = LinkProfile(delay_ms=100.0, jitter_ms=jitter_ms)
    way = SLOW_LINK.Way(profile, 1_000.0, "seed")
    now_s = free_s = last_s = 0.0
    for gap_s, size in sizes:
        now_s += gap_s
        free_s = max(free_s, now_s) + size / 1_000.0
        arrival_s = way.arrival_s(now_s, size)
        assert max(last_s, free_s + 0.1) <= arrival_s <= max(last_s, free_s + 0.1 + jitter_ms / 1000.0) + 1e-9
        last_s = arrival_s


def test_a_share_of_the_packets_is_lost() -> None:
    way = SLOW_LINK.Way(LinkProfile(resent=0.1), None, "seed")
    lost = sum(way.arrival_s(float(i), 100) is None for i in range(10_000))
    assert lost == pytest.approx(1_000, abs=120)


def test_costs_are_those_of_calls_and_messages() -> None:
    assert BESIDE.line_through([(1, 0.012), (5, 0.02), (9, 0.028)]) == pytest.approx(ModelPace(0.01, 0.002))
    assert BESIDE.line_through([(4, 0.02), (4, 0.04)]) == pytest.approx(ModelPace(0.03))
    assert BESIDE.line_through([]) == ModelPace(0.0)
    assert BESIDE.line_through([(2, 0.001), (4, 0.011)]) == pytest.approx(ModelPace(0.0, 0.002))  # no call takes -9 ms
    falling = BESIDE.line_through([(1, 0.03), (9, 0.01)])  # larger calls are never faster
    assert falling == pytest.approx(ModelPace(0.02))
    measured = {
        "agent": PARTS.Measured(0.2, 100, [(1, 0.001), (4, 0.009)]),
        "cloud": PARTS.Measured(0.4, 100, [(4, 0.02)]),
        "edge": PARTS.Measured(0.0, 0, []),
    }
    costs = BESIDE.costs_of(measured)
    assert costs.paces.device.call_s == pytest.approx(0.002)
    assert costs.own_s == pytest.approx({"agent": 0.002, "cloud": 0.004, "edge": 0.0})


def benchmark(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({} if path is None else {"PATH": path})}
    command = [sys.executable, "beside.py", *arguments]
    return subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_an_unknown_link_is_one_line() -> None:
    done = benchmark("--links", "ltee")
    assert done.returncode == 2
    assert done.stderr.startswith("beside.py: --links must be one of lan, ")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="ip is not installed")
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="a slow link needs root")
def test_the_same_text_comes_over_mqtt_and_in_the_simulator(tmp_path: Path) -> None:
    before = set(Path("/run/netns").glob("*"))
    done = benchmark(
        *("--links", "lan", "--variants", "exact", "--texts", "1", "--tokens", "8", "--runs", "2"),
        *("--out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 rows have the same ids in every fleet." in done.stdout
    (row,) = csv.DictReader((tmp_path / "on-lan.csv").read_text().splitlines())
    assert float(row["tokens/s over MQTT"]) > 0.0
    assert float(row["ms an LLM call"]) + float(row["and a token in it"]) > 0.0
    assert set(Path("/run/netns").glob("*")) <= before
