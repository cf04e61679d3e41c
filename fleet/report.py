"""What a demo measured, as figures with documented names, as a table, and as JSON."""

from collections import Counter
from typing import Final, NamedTuple

import msgspec
from rich.table import Table

from fedhlm.messages import Source

SOURCES: Final[tuple[Source, ...]] = ("local", "peer", "neighbour", "cloud", "unverified")


class Generated(msgspec.Struct, kw_only=True):
    """One finished request as the client saw it; `statistics` are the agent's own (see edge_agent.agent.Result)."""

    agent: str
    task: str  # "continue" or "topic"
    prompt: str
    topic: str
    seed: int
    max_tokens: int
    temperature: float | None = None
    ids: list[int] = msgspec.field(default_factory=list)
    sources: list[str] = msgspec.field(default_factory=list)
    text: str = ""
    finish: str | None = None
    error: str = ""
    statistics: dict[str, float] = msgspec.field(default_factory=dict)


class Alternatives(NamedTuple):
    """What stands beside a request: the LLM's own ids and text, and the SLM's own topic word."""

    llm_ids: list[int]
    llm_text: str
    slm_word: str


class Accuracy(msgspec.Struct, kw_only=True):
    """Share of topic prompts whose first word is the right topic; None where nothing was asked."""

    slm: float | None
    system: float | None
    llm: float | None


class Figures(msgspec.Struct, kw_only=True):
    """The demo's result for one preset; shares in 0..1, bytes with MQTT framing, seconds."""

    preset: str
    seed: int
    tokens: int
    requests: int
    failed: int
    tokens_by_source: dict[str, int]
    identical_to_llm: float | None
    mismatches: int
    topic_accuracy: Accuracy
    uplink_bytes_per_token: float
    uplink_messages_per_token: float
    round_trips_per_token: float
    rollbacks: int
    discarded_drafts_per_token: float
    mean_beta: float
    tokens_per_second: float
    wall_s: float


class Report(Figures, kw_only=True):
    """The figures of the run, with the same measured on a few prompts under the preset `hlm`."""

    comparison: Figures | None = None
    stopped_early: bool = False


def figures(
    preset: str, seed: int, requests: list[Generated], alone: dict[int, Alternatives], wall_s: float
) -> Figures:
    """Sum up finished requests; `alone` is by index into `requests`, and a request without entry is not compared."""
    done = [r for r in requests if r.finish is not None]
    tokens = sum(len(r.ids) for r in done)
    compared = [(r, alone[i]) for i, r in enumerate(requests) if i in alone and r.finish is not None]
    equal = sum(a == b for r, other in compared for a, b in zip(r.ids, other.llm_ids, strict=False))
    compared_tokens = sum(len(r.ids) for r, _ in compared)

    def total(name: str) -> float:
        return sum(r.statistics.get(name, 0.0) for r in done)

    def per_token(name: str) -> float:
        return total(name) / tokens if tokens else 0.0

    betas = [r.statistics["mean_beta"] for r in done if "mean_beta" in r.statistics]
    return Figures(
        preset=preset,
        seed=seed,
        tokens=tokens,
        requests=len(done),
        failed=sum(r.finish == "error" for r in done),
        tokens_by_source={s: Counter(x for r in done for x in r.sources)[s] for s in SOURCES},
        identical_to_llm=equal / compared_tokens if compared_tokens else None,
        mismatches=compared_tokens - equal,
        topic_accuracy=_accuracy(done, compared),
        uplink_bytes_per_token=per_token("uplink_bytes"),
        uplink_messages_per_token=per_token("uplink_messages"),
        round_trips_per_token=per_token("round_trips"),
        rollbacks=round(total("rollbacks")),
        discarded_drafts_per_token=per_token("discarded"),
        mean_beta=sum(betas) / len(betas) if betas else 0.0,
        tokens_per_second=tokens / wall_s if wall_s else 0.0,
        wall_s=wall_s,
    )


def _accuracy(done: list[Generated], compared: list[tuple[Generated, Alternatives]]) -> Accuracy:
    asked = [r.text.strip() == r.topic for r in done if r.task == "topic"]
    slm = [other.slm_word.strip() == r.topic for r, other in compared if r.task == "topic"]
    llm = [other.llm_text.strip() == r.topic for r, other in compared if r.task == "topic"]
    return Accuracy(slm=_mean(slm), system=_mean(asked), llm=_mean(llm))


def _mean(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def table(report: Report) -> Table:
    """The closing table: the run beside its comparison."""
    columns: list[Figures] = [report] + ([report.comparison] if report.comparison else [])
    shown = Table(title="who settled the text, and at what price", title_justify="left")
    shown.add_column("")
    for column in columns:
        shown.add_column(column.preset, justify="right")
    for label, cells in _rows(columns):
        shown.add_row(label, *cells)
    return shown


def _rows(columns: list[Figures]) -> list[tuple[str, list[str]]]:
    def row(label: str, *cells: str) -> tuple[str, list[str]]:
        return label, list(cells)

    rows = [
        row("requests", *(f"{c.requests}" + (f" ({c.failed} failed)" if c.failed else "") for c in columns)),
        row("tokens", *(f"{c.tokens}" for c in columns)),
    ]
    rows += [
        row(f"  settled by {source}", *(_share(c.tokens_by_source[source], c.tokens) for c in columns))
        for source in SOURCES
        if any(c.tokens_by_source[source] for c in columns)
    ]
    rows += [
        row("identical to the LLM alone", *(_percent(c.identical_to_llm) for c in columns)),
        row("topic right: SLM alone", *(_percent(c.topic_accuracy.slm) for c in columns)),
        row("topic right: this system", *(_percent(c.topic_accuracy.system) for c in columns)),
        row("topic right: LLM alone", *(_percent(c.topic_accuracy.llm) for c in columns)),
        row("uplink bytes per token", *(f"{c.uplink_bytes_per_token:,.1f}" for c in columns)),
        row("uplink messages per token", *(f"{c.uplink_messages_per_token:.2f}" for c in columns)),
        row("round trips per token", *(f"{c.round_trips_per_token:.2f}" for c in columns)),
        row("rollbacks", *(f"{c.rollbacks}" for c in columns)),
        row("mean rejection probability", *(f"{c.mean_beta:.3f}" for c in columns)),
        row("tokens per second, fleet", *(f"{c.tokens_per_second:.1f}" for c in columns)),
    ]
    return rows


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else "0"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
