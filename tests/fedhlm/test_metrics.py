"""Metrics: one table from which exports and docs are made, and what promtool says of them."""

import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedhlm.errors import ConfigError
from fedhlm.exposition import LABELS_MAX, accepted, exported, role_of
from fedhlm.marks import rewritten
from fedhlm.metrics import BY_NAME, HISTOGRAMS, METRICS, parts
from fedhlm.telemetry import Counters

ROOT = Path(__file__).parents[2]
OBSERVE = ROOT / "deploy" / "observe"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def scraped(counters: Counters, port: int, party: str = "porch") -> str:
    with (
        exported(counters, party=party, port=port),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer,
    ):
        text: str = answer.read().decode()
        return text


def everything() -> Counters:
    """A count, a value or an observation of every metric."""
    counters = Counters()
    for metric in METRICS:
        match metric.kind:
            case "counter":
                counters.add(metric.name, 1, label="0" if metric.label else "")
            case "gauge":
                counters.set(metric.name, 1.0)
            case "histogram":
                counters.observe(metric.name, 0.3)
    return counters


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_counters_and_gauges_are_served_to_prometheus_while_the_block_runs(free_port: int) -> None:
    counters = Counters()
    address = f"http://127.0.0.1:{free_port}/metrics"
    with exported(counters, party="porch", port=free_port):
        counters.add("retries", 2)
        counters.add("tokens_by_source", 5, label="cloud")
        counters.set("tau", 0.4)
        counters.set("tau", -1.0)
        with urllib.request.urlopen(address) as answer:
            text = answer.read().decode()
    assert 'fedhlm_retries_total{party="porch",role="agent"} 2.0' in text
    assert 'fedhlm_tokens_by_source_total{party="porch",role="agent",source="cloud"} 5.0' in text
    assert "# HELP fedhlm_rollbacks_total drafts taken back after a verdict" in text
    assert "# TYPE fedhlm_tau gauge" in text
    assert 'fedhlm_tau{party="porch",role="agent"} -1.0' in text
    assert "fedhlm_similarity" not in text, "a gauge that was never set has no value"
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address)


def test_port_zero_serves_nothing() -> None:
    before = threading.active_count()
    with exported(Counters(), party="porch", port=0) as port:
        assert port == 0
        assert threading.active_count() == before


def test_a_taken_port_names_the_key() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(
                ConfigError,
                match=rf"telemetry\.metrics_port must be a port that is free on 127\.0\.0\.1 \(got {port}: ",
            ),
            exported(Counters(), party="porch", port=port),
        ):
            pass


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    assert page == rewritten(page, parts()), "run python -m fedhlm.metrics docs/metrics.md"
    assert all(f"`{metric.exported}`" in page for metric in METRICS)


def test_a_name_stands_once_in_the_table_and_histograms_have_rising_buckets() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric


def test_every_metric_is_exported_and_prometheus_can_read_it(free_port: int) -> None:
    families = {f.name: f for f in text_string_to_metric_families(scraped(everything(), free_port))}
    assert families.keys() >= {metric.exported.removesuffix("_total") for metric in METRICS}
    for metric in METRICS:
        family = families[metric.exported.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        assert all(s.labels["party"] == "porch" and s.labels["role"] == "agent" for s in family.samples)


def test_a_histogram_is_cumulative_and_counts_a_bound_as_inside(free_port: int) -> None:
    counters = Counters()
    for value in (0.01, 0.011, 0.5, 7.0):
        counters.observe("doubt", value)
    counters.observe("doubt", 0.6, times=2)
    text = scraped(counters, free_port)

    def bucket(bound: str) -> float:
        found = re.search(rf'fedhlm_doubt_bucket{{le="{bound}",[^}}]*}} (\S+)', text)
        assert found, bound
        return float(found[1])

    assert [bucket(b) for b in ("0.01", "0.02", "0.5", "0.6", "1.0", r"\+Inf")] == [1, 2, 3, 5, 5, 6]
    assert 'fedhlm_doubt_count{party="porch",role="agent"} 6.0' in text
    assert f'fedhlm_doubt_sum{{party="porch",role="agent"}} {0.01 + 0.011 + 0.5 + 7.0 + 1.2}' in text


def test_a_measured_gauge_is_read_when_it_is_asked_for() -> None:
    counters, waiting = Counters(), [1, 2]
    counters.measure("num_requests_waiting", lambda: len(waiting))
    counters.measure("num_requests_waiting", lambda: 10)
    assert counters.snapshot()["num_requests_waiting"] == 12
    waiting.clear()
    assert counters.snapshot()["num_requests_waiting"] == 10
    with pytest.raises(KeyError):
        counters.measure("retries", lambda: 0)


def test_an_edge_exports_what_its_agents_report_under_their_names(free_port: int) -> None:
    agent, edge = everything(), Counters()
    edge.add("batches", 4)
    edge.relayed["porch"] = accepted(agent.snapshot())
    text = scraped(edge, free_port, party="edge-home")
    assert 'fedhlm_batches_total{party="edge-home",role="edge"} 4.0' in text
    assert 'fedhlm_tau{party="porch",role="agent"} 1.0' in text
    assert 'fedhlm_doubt_bucket{le="+Inf",party="porch",role="agent"} 1.0' in text
    assert text.count("# TYPE fedhlm_batches_total counter") == 1, "one family for all parts"


def test_of_what_an_agent_reports_only_the_possible_is_taken() -> None:
    good = {"retries": 3.0, "tau": -1.0, "tokens_by_source.cloud": 2.0, "doubt.0": 1.0, "doubt.sum": 0.5}
    last = len(HISTOGRAMS["doubt"])
    bad = {
        "unheard_of": 1.0,
        "retries.x": 1.0,
        "rollbacks": -1.0,
        "escalations": float("nan"),
        "risk": float("inf"),
        "tokens_by_source": 1.0,
        'tokens_by_source.a"b': 1.0,
        "tokens_by_source." + "x" * 33: 1.0,
        "doubt": 1.0,
        f"doubt.{last + 1}": 1.0,
        "doubt.\u0663": 1.0,
    }
    assert accepted(good | bad) == good
    flood = accepted({f"tokens_by_source.{i}": 1.0 for i in range(LABELS_MAX + 100)})
    assert len(flood) == LABELS_MAX


def test_a_role_is_told_by_the_name() -> None:
    assert [role_of(name) for name in ("cloud", "edge-home", "porch")] == ["cloud", "edge", "agent"]


# What an operator reads


def test_alerts_and_dashboard_name_metrics_of_the_table() -> None:
    known = {metric.exported for metric in METRICS}
    known |= {f"fedhlm_{name}_{ending}" for name in HISTOGRAMS for ending in ("bucket", "sum", "count")}
    for file in (OBSERVE / "rules.yml", OBSERVE / "dashboard.json"):
        named = set(re.findall(r"\bfedhlm_\w+", file.read_text("utf-8")))
        assert named, file
        assert not sorted(named - known), file


def promtool(*arguments: str | Path, given: str = "") -> None:
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip(), done.stderr


@needs_promtool
def test_promtool_has_nothing_to_say_of_the_metrics(free_port: int) -> None:
    edge = everything()
    edge.relayed["porch"] = accepted(edge.snapshot())
    text = scraped(edge, free_port, party="edge-home")
    promtool("check", "metrics", given=text)
    with pytest.raises(AssertionError, match="no help text"):
        promtool("check", "metrics", given="# TYPE fedhlm_bad counter\nfedhlm_bad 1\n")


@needs_promtool
def test_promtool_accepts_the_rules_and_the_alerts_fire_when_they_should() -> None:
    assert (
        "SUCCESS"
        in subprocess.run(
            ["promtool", "check", "rules", "--lint-fatal", OBSERVE / "rules.yml"], capture_output=True, text=True
        ).stdout
    )
    promtool("test", "rules", OBSERVE / "rules_test.yml")


@needs_promtool
def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    shutil.copy(OBSERVE / "rules.yml", tmp_path)
    text = (OBSERVE / "prometheus.yml").read_text("utf-8")
    assert "/etc/prometheus/rules.yml" in text
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/", f"{tmp_path}/"), "utf-8")
    promtool("check", "config", tmp_path / "prometheus.yml")


@needs_promtool
def test_every_query_of_the_table_and_the_dashboard_is_promql(tmp_path: Path) -> None:
    panels = json.loads((OBSERVE / "dashboard.json").read_text("utf-8"))["panels"]
    queries = [metric.query for metric in METRICS]
    queries += [target["expr"] for panel in panels for target in panel.get("targets", ())]
    rules = [{"record": f"checked:query_{i}", "expr": query} for i, query in enumerate(queries)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}), "utf-8")
    promtool("check", "rules", file)
