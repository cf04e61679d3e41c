"""Every counter, gauge and histogram of a part: one table, from which exports and documentation are made.

The names are vLLM's where it has such a figure, with the prefix `fedhlm_` in place of `vllm:`. Prometheus keeps the
colon for recording rules, and `promtool check metrics` refuses it elsewhere.

`python -m fedhlm.metrics docs/metrics.md` writes the generated part of that file.
"""

import sys
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from fedhlm.marks import cell, rewrite

PREFIX: Final = "fedhlm_"
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
UNIT: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
POWERS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class Metric(NamedTuple):
    """One row of the table.

    `label` is the name of its label besides `party` and `role`; empty: none. `buckets` are the upper bounds of a
    histogram, in its unit. `promql` is the query to start from; empty: the usual one of its kind.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    label: str = ""
    buckets: tuple[float, ...] = ()
    promql: str = ""

    @property
    def exported(self) -> str:
        """The name under which Prometheus stores it; a histogram has the endings _bucket, _sum and _count besides."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def query(self) -> str:
        """The query to start from."""
        if self.promql:
            return self.promql
        by = f"party, {self.label}" if self.label else "party"
        match self.kind:
            case "counter":
                return f"sum by ({by}) (rate({self.exported}[5m]))"
            case "histogram":
                return f"histogram_quantile(0.95, sum by (le) (rate({self.exported}_bucket[5m])))"
            case "gauge":
                return self.exported


METRICS: Final = (
    Metric(
        "refused_messages",
        "counter",
        "payloads that were not a valid message of their topic, or came from the wrong sender",
    ),
    Metric("dropped_messages", "counter", "messages dropped because an incoming or outgoing queue was full"),
    Metric(
        "unsent_messages",
        "counter",
        "messages not sent: queue full, expired in the queue, rejected by the broker, or lost at QoS 0",
    ),
    Metric(
        "limited_messages",
        "counter",
        "messages beyond their sender's rate: blocks among them are refused, others dropped",
    ),
    Metric(
        "too_large_messages", "counter", "messages or items dropped because they are larger than the broker accepts"
    ),
    Metric("expired_messages", "counter", "blocks dropped because their deadline had passed"),
    Metric("stale_verdicts", "counter", "verdicts of an epoch that a rollback had ended"),
    Metric("late_verdicts", "counter", "verdicts for tokens that were committed already at their deadline"),
    Metric("duplicate_messages", "counter", "messages that had been handled before"),
    Metric("escalations", "counter", "blocks sent upwards"),
    Metric("verdicts", "counter", "verdicts received or given"),
    Metric("retries", "counter", "escalations sent again"),
    Metric(
        "approximate_tokens",
        "counter",
        "tokens that are not certain to be the LLM's own, because its server tells only the likeliest ones",
    ),
    Metric("stale_escalations", "counter", "blocks of an epoch that a rollback had ended"),
    Metric("rollbacks", "counter", "drafts taken back after a verdict"),
    Metric("reprimes", "counter", "sessions whose context had to be sent again"),
    Metric("evictions", "counter", "sessions dropped from a full cache"),
    Metric("evicted_caches", "counter", "KV caches dropped to make room for others, and computed again when needed"),
    Metric(
        "fingerprint_mismatches",
        "counter",
        "requests rejected because both ends have different tokenizers, vocabularies or noise",
    ),
    Metric("batches", "counter", "batches sent or computed"),
    Metric("computed_tokens", "counter", "tokens that the large model computed, those of prompts included"),
    Metric("reconnects", "counter", "connections to the broker after the first"),
    Metric("sent_messages", "counter", "messages sent to brokers"),
    Metric("sent_bytes", "counter", "bytes sent to brokers in PUBLISH packets"),
    Metric("received_messages", "counter", "messages received from brokers"),
    Metric("received_bytes", "counter", "bytes received from brokers in PUBLISH packets"),
    Metric("uplink_messages", "counter", "messages sent towards the cloud"),
    Metric("uplink_bytes", "counter", "bytes sent towards the cloud, MQTT headers included"),
    Metric("downlink_messages", "counter", "messages received from the cloud's side"),
    Metric("downlink_bytes", "counter", "bytes received from the cloud's side, MQTT headers included"),
    Metric("drafted_tokens", "counter", "tokens drafted by the small model"),
    Metric("discarded_tokens", "counter", "drafts discarded without being committed"),
    Metric("escalated_tokens", "counter", "drafts sent upwards"),
    Metric("audits", "counter", "tails that the target scored for the certificate"),
    Metric("lost_audits", "counter", "audits without an answer; their tokens count as wrong"),
    Metric("audit_messages", "counter", "messages sent for audits only, because no escalation carried them in time"),
    Metric(
        "contributions",
        "counter",
        "federated contributions taken, from agents at an edge or from clusters at the cloud",
    ),
    Metric("refused_contributions", "counter", "federated contributions with impossible sums or thresholds"),
    Metric(
        "cut_contributions",
        "counter",
        "contributions that claimed more tokens, or less harm, than the edge saw in verdicts",
    ),
    Metric(
        "cut_evidence",
        "counter",
        "contributions whose certificate promised much more than what the edge saw in verdicts allows",
    ),
    Metric("forgotten_members", "counter", "operators' orders to forget a member that were obeyed"),
    Metric("rounds", "counter", "federated rounds completed"),
    Metric("verified_tokens", "counter", "tokens that the cloud settled in doubtful contexts, remembered at the edge"),
    Metric("peer_answers", "counter", "blocks that the edge settled from its own cluster's verified tokens"),
    Metric("neighbour_answers", "counter", "blocks that the edge settled with a neighbour cluster's verified tokens"),
    Metric("refused_keys", "counter", "context keys of another length than this edge's"),
    Metric(
        "assignments", "counter", "assignments of agents to another cluster, made by the cloud or relayed by an edge"
    ),
    Metric("broker_connections", "counter", "connections to the edge's own broker"),
    Metric(
        "broker_takeovers", "counter", "connections to it that ended because another client connected with the same id"
    ),
    Metric("broker_silences", "counter", "connections to it that ended because the client was silent"),
    Metric("broker_refusals", "counter", "connections that it rejected"),
    Metric("broker_received", "counter", "messages that it received"),
    Metric("broker_sent", "counter", "messages that it sent"),
    Metric("broker_dropped", "counter", "messages that it dropped: too large, or for a client that reads too slowly"),
    Metric("tokens_by_source", "counter", "committed tokens, labelled by source", label="source"),
    Metric(
        "always_verified", "counter", "drafts that were verified whatever their doubt, labelled by rule", label="rule"
    ),
    Metric("generations", "counter", "finished generations, labelled by finish reason", label="finish"),
    Metric("spec_decode_num_drafts", "counter", "blocks of drafts that the large model has verified"),
    Metric("spec_decode_num_draft_tokens", "counter", "drafts in the blocks that the large model has verified"),
    Metric(
        "spec_decode_num_accepted_tokens",
        "counter",
        "drafts that the large model accepted",
        promql="rate(fedhlm_spec_decode_num_accepted_tokens_total[5m]) / rate(fedhlm_spec_decode_num_draft_tokens_total[5m])",
    ),
    Metric(
        "spec_decode_num_accepted_tokens_per_pos",
        "counter",
        "drafts that the large model accepted, labelled by their position in the block, from 0",
        label="position",
    ),
    Metric("prompt_tokens", "counter", "tokens of the prompts that were served"),
    Metric("refused_requests", "counter", "prompts that were not served, labelled by reason", label="reason"),
    Metric(
        "risk",
        "gauge",
        "estimated harm per token of kept tokens (R-hat), after the newest generation that could be audited",
    ),
    Metric("risk_limit", "gauge", "upper confidence limit of the harm per token"),
    Metric("fleet_risk", "gauge", "estimated harm per token of all devices' kept tokens, for the present large model"),
    Metric("fleet_risk_limit", "gauge", "upper confidence limit of the fleet's harm per token"),
    Metric("fleet_risk_tokens", "gauge", "tokens that the fleet's estimate covers"),
    Metric("risk_generations", "gauge", "generations that the estimate covers"),
    Metric("tau", "gauge", "threshold on the doubt in the newest generation; below 0 every token was verified"),
    Metric(
        "similarity", "gauge", "cosine from which peers settled tokens, in the newest generation in which they could"
    ),
    Metric("risk_budget", "gauge", "error per token that the device may reach (generation.budget)"),
    Metric(
        "num_requests_running",
        "gauge",
        "prompts that an agent serves, or blocks that the cloud verifies, at this moment",
    ),
    Metric("num_requests_waiting", "gauge", "prompts, or blocks at an edge or the cloud, that wait for their turn"),
    Metric("round", "gauge", "number of the newest federated round"),
    Metric("agents_online", "gauge", "agents of the cluster that are online"),
    Metric("cloud_online", "gauge", "1 while the edge sees a cloud, otherwise 0"),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "from the arrival of a prompt to its first committed token",
        buckets=SECONDS,
    ),
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "between two committed tokens; tokens that are committed together share the time evenly",
        buckets=SECONDS,
    ),
    Metric(
        "e2e_request_latency_seconds",
        "histogram",
        "from the arrival of a prompt to the end of its text",
        buckets=SECONDS,
    ),
    Metric("doubt", "histogram", "doubt u of the drafts in finished texts", buckets=UNIT),
    Metric("harm", "histogram", "harm (1 - beta) of the drafts that the large model has scored", buckets=UNIT),
    Metric(
        "verifier_latency_seconds",
        "histogram",
        "from the arrival of a block at the cloud to its verdict, audits left out",
        buckets=SECONDS,
    ),
    Metric("verifier_batch_blocks", "histogram", "blocks in one call of the large model", buckets=POWERS),
)

BY_NAME: Final = {metric.name: metric for metric in METRICS}
COUNTERS: Final = {metric.name: metric.meaning for metric in METRICS if metric.kind == "counter"}
GAUGES: Final = {metric.name: metric.meaning for metric in METRICS if metric.kind == "gauge"}
HISTOGRAMS: Final = {metric.name: metric.buckets for metric in METRICS if metric.kind == "histogram"}
LABELS: Final = {metric.name: metric.label for metric in METRICS if metric.label}


def markdown() -> str:
    """Return the table as Markdown, as shown in docs/metrics.md."""
    lines = ["| name | type | label | meaning | PromQL to begin with |", "|" + "---|" * 5]
    for metric in METRICS:
        label = f"`{metric.label}`" if metric.label else ""
        lines.append(
            f"| `{metric.exported}` | {metric.kind} | {label} | {cell(metric.meaning)} | `{cell(metric.query)}` |"
        )
    return "\n".join(lines)


def parts() -> Mapping[str, str]:
    """Return the generated part of docs/metrics.md by the name of its mark."""
    return {"metrics": markdown()}


if __name__ == "__main__":
    rewrite(sys.argv[1:], parts())
