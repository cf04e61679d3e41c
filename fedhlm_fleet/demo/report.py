"""The results of a demo: figures with documented names, which can be written as a table and as JSON."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from rich import box
from rich.table import Table

from fedhlm import choices
from fedhlm.learning.certificate import Certificate
from fedhlm.protocol.fields import Source
from fedhlm.settings import Generation

SOURCES: Final[dict[Source, str]] = {
    "local": "kept on the device",
    "peer": "settled by peers",
    "neighbour": "by a neighbour cluster",
    "cloud": "by the cloud",
    "unverified": "unverified, link gone",
}
# Texts of these couplings are functions of the seed and can equal the LLM's; under the others only the law is the same.
SEEDED: Final = frozenset({"gumbel", "greedy"})


_GAP: Final = 3  # between two columns of the table, at most


class Generated(msgspec.Struct, kw_only=True):
    """One request as the client saw it; `statistics` are the agent's own (see edge_agent.core.Result)."""

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
    """What the models write alone for a request: the LLM's ids and text, and the SLM's topic word."""

    llm_ids: list[int]
    llm_text: str
    slm_word: str


class Accuracy(msgspec.Struct, kw_only=True):
    """Share of topic questions that were answered with the right topic; None if there were none."""

    slm: float | None
    system: float | None
    llm: float | None


class Figures(msgspec.Struct, kw_only=True):
    """The figures of one preset: shares in 0..1, bytes with MQTT framing, times in seconds. None: not measured.

    `transmissions_saved` is 1 - uplink messages per token, the saving against one message for every token. `compared`
    counts the requests that the models also wrote alone; a failed request has no text to compare. `risk` is R-hat for
    the continued texts of all agents together, and `risk_limit` the limit of their pooled certificate. `tau_start` and
    `tau_end` are means over the agents, with 0 where every token was verified.
    """

    preset: str
    seed: int
    tokens: int
    requests: int
    failed: int
    first_error: str
    tokens_by_source: dict[str, int]
    compared: int
    identical_to_llm: float | None
    exact_match: float | None
    mismatches: int
    topic_accuracy: Accuracy
    uplink_bytes_per_token: float
    uplink_messages_per_token: float
    transmissions_saved: float | None
    cluster_bytes_per_token: float
    round_trips_per_token: float
    rollbacks: int
    discarded_drafts_per_token: float
    mean_beta: float
    risk: float | None
    risk_limit: float | None
    risk_generations: int
    tau_start: float | None
    tau_end: float | None
    tokens_per_second: float
    wall_s: float


class TruthRow(msgspec.Struct, frozen=True, kw_only=True):
    """The truth of one agent's texts at one temperature, or of `all` agents, and the certificate's words about them.

    Only texts that the certificate accounts for are counted; the others wait for their audits. `tokens` leaves out those
    that are always verified, which no budget counts. `wrong` of the `kept` tokens are not what the LLM would have
    written, and `truth` is their share of `tokens`. `ever_above` says that the truth was once above `risk_limit`, after
    any text.
    """

    agent: str
    temperature: float
    texts: int
    tokens: int
    kept: int
    wrong: int
    truth: float
    risk: float
    risk_limit: float
    ever_above: bool


class Report(Figures, kw_only=True):
    """The figures of the run, and those of the comparison after it: the same few prompts under several presets.

    `budget` is None if the preset has none; `alpha` and `skew` are None if all agents share one list of news.
    `truth` is empty unless it was asked for.
    """

    budget: float | None = None
    alpha: float | None = None
    skew: float | None = None
    rounds: dict[str, int] = {}
    comparisons: list[Figures] = []
    truth: list[TruthRow] = []
    stopped_early: bool = False


class PresetRun(NamedTuple):
    """The requests under one preset, with its settings, the seed of the demo, and the wall time in seconds."""

    preset: str
    generation: Generation
    seed: int
    requests: list[Generated]
    wall_s: float


def figures(run: PresetRun, alone: Mapping[int, Alternatives]) -> Figures:
    """Sum up finished requests; `alone` is keyed by the index of the request, and the others are not compared."""
    done = [r for r in run.requests if r.finish is not None]
    failures = [r for r in done if r.finish == "error"]
    tokens = sum(len(r.ids) for r in done)
    compared = [(r, alone[i]) for i, r in enumerate(run.requests) if i in alone and r.finish not in (None, "error")]
    # At temperature 0 nothing is sampled, so the texts of every coupling can be compared.
    alike = run.generation.coupling in SEEDED or run.generation.temperature == 0.0
    seeded = compared if alike else []
    equal = sum(a == b for r, other in seeded for a, b in zip(r.ids, other.llm_ids, strict=False))
    compared_tokens = sum(len(r.ids) for r, _ in seeded)
    continued = [r for r in done if r.task == "continue"]

    def total(name: str) -> float:
        return sum(r.statistics.get(name, 0.0) for r in done)

    def per_token(name: str) -> float:
        return total(name) / tokens if tokens else 0.0

    betas = [r.statistics["mean_beta"] for r in done if "mean_beta" in r.statistics]
    known = certificate_of(continued)
    taus = taus_of(continued) if choices.GATES[run.generation.gate].by_doubt else []
    return Figures(
        preset=run.preset,
        seed=run.seed,
        tokens=tokens,
        requests=len(done),
        failed=len(failures),
        first_error=failures[0].error if failures else "",
        tokens_by_source={s: Counter(x for r in done for x in r.sources)[s] for s in SOURCES},
        compared=len(compared),
        identical_to_llm=equal / compared_tokens if compared_tokens else None,
        exact_match=_mean([r.ids == other.llm_ids for r, other in seeded if r.task == "continue"]),
        mismatches=compared_tokens - equal,
        topic_accuracy=_accuracy(done, compared),
        uplink_bytes_per_token=per_token("uplink_bytes"),
        uplink_messages_per_token=per_token("uplink_messages"),
        transmissions_saved=1.0 - per_token("uplink_messages") if tokens else None,
        cluster_bytes_per_token=per_token("cluster_bytes"),
        round_trips_per_token=per_token("round_trips"),
        rollbacks=round(total("rollbacks")),
        discarded_drafts_per_token=per_token("discarded"),
        mean_beta=sum(betas) / len(betas) if betas else 0.0,
        risk=None if known is None else known.estimate,
        risk_limit=None if known is None else known.limit(run.generation.confidence),
        risk_generations=0 if known is None else round(known.texts),
        tau_start=_mean([first for first, _ in taus]),
        tau_end=_mean([last for _, last in taus]),
        tokens_per_second=tokens / run.wall_s if run.wall_s else 0.0,
        wall_s=run.wall_s,
    )


def certificate_of(requests: Sequence[Generated]) -> Certificate | None:
    """Return the pooled certificate of all agents, from the latest report of each; None if nothing was audited."""
    latest = {r.agent: r.statistics for r in requests if "risk_tokens" in r.statistics}
    named = ({name.removeprefix("risk_"): value for name, value in last.items()} for last in latest.values())
    return sum(map(Certificate.of_figures, named), Certificate()) if latest else None


def taus_of(requests: Sequence[Generated]) -> list[tuple[float, float]]:
    """Return, for each agent with reports, the thresholds of its first and last request; 0 if all is verified."""
    by_agent: dict[str, list[float]] = {}
    for request in requests:
        if "tau" in request.statistics:
            by_agent.setdefault(request.agent, []).append(max(0.0, request.statistics["tau"]))
    return [(taus[0], taus[-1]) for taus in by_agent.values()]


def _accuracy(done: list[Generated], compared: list[tuple[Generated, Alternatives]]) -> Accuracy:
    asked = [r.text.strip() == r.topic for r in done if r.task == "topic"]
    slm = [other.slm_word.strip() == r.topic for r, other in compared if r.task == "topic"]
    llm = [other.llm_text.strip() == r.topic for r, other in compared if r.task == "topic"]
    return Accuracy(slm=_mean(slm), system=_mean(asked), llm=_mean(llm))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def tables(report: Report, width: int) -> list[Table]:
    """Return the closing table: the whole run, then the same few prompts under each preset.

    If `width` characters are too few for all columns, there are several tables.
    """
    columns: list[Figures] = [report, *report.comparisons]
    # Models that were never trained to name topics get every one wrong, by themselves too: no figure of a fleet.
    named = any(x for c in columns for x in (c.topic_accuracy.slm, c.topic_accuracy.system, c.topic_accuracy.llm))
    shown_rows = _ROWS if named else {label: cell for label, cell in _ROWS.items() if label not in _TOPIC_ROWS}
    rows = {label: [cell(column) for column in columns] for label, cell in shown_rows.items()}
    rows = {label: cells for label, cells in rows.items() if any(c not in ("-", "0") for c in cells)}
    headings = [f"{c.preset}\n{f'same {c.requests}' if i else 'the run'}" for i, c in enumerate(columns)]
    room = width - max(map(len, rows)) - _GAP
    shown: list[list[int]] = []
    left = 0
    for i, heading in enumerate(headings):
        wanted = _GAP + max(len(text) for text in (*heading.split("\n"), *(cells[i] for cells in rows.values())))
        if not shown or left < wanted:
            shown.append([])
            left = room
        shown[-1].append(i)
        left -= wanted
    return [_table(chosen, headings, rows) for chosen in shown]


def _table(chosen: list[int], headings: list[str], rows: dict[str, list[str]]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    made.add_column("", no_wrap=True)
    for i in chosen:
        made.add_column(headings[i], justify="right", no_wrap=True)
    for label, cells in rows.items():
        made.add_row(label, *(cells[i] for i in chosen))
    return made


def notes(report: Report) -> list[str]:
    """Explain the words that appear in the table."""
    lines = []
    if report.failed:
        lines.append(f"{report.failed} of {report.requests} requests failed, the first of them: {report.first_error}")
    if report.comparisons:
        lines.append(
            f"same {report.comparisons[0].requests}: the same requests, with the same seeds, of the same agents under "
            "every preset, asked after the run."
        )
    lines.append("uplink: to the cloud; saved: against one message for each token. Bytes are those of MQTT packets.")
    if report.compared and report.identical_to_llm is not None:
        lines.append(
            "equal to LLM only: compared with what the LLM writes by itself with the same seed, in the run for "
            f"{report.compared} requests. One token that differs changes all that follow; this is not the error per token."
        )
    if any(c.compared and c.identical_to_llm is None for c in (report, *report.comparisons)):
        lines.append("-: this preset draws other random numbers than the LLM only, so its texts need not be equal.")
    if report.truth:
        lines.append(
            "truth: the share of tokens that were kept and that the LLM would not have written there, over the texts "
            "that a certificate accounts for."
        )
    if report.risk_limit is not None:
        lines.append(
            "error per token: what keeping drafts is estimated to cost (R-hat); upper limit: the certificate's, at the "
            "preset's confidence and at every moment."
        )
    return lines


def _share_of(source: str) -> Callable[[Figures], str]:
    def cell(c: Figures) -> str:
        part = c.tokens_by_source[source]
        return f"{part / c.tokens:.1%}" if part else "0"

    return cell


_TOPIC_ROWS: Final[dict[str, Callable[[Figures], str]]] = {
    "topic accuracy": lambda c: _percent(c.topic_accuracy.system),
    "  SLM only": lambda c: _percent(c.topic_accuracy.slm),
    "  LLM only": lambda c: _percent(c.topic_accuracy.llm),
}
_ROWS: Final[dict[str, Callable[[Figures], str]]] = {
    "requests failed": lambda c: f"{c.failed}",
    "tokens": lambda c: f"{c.tokens}",
    **{f"  {words}": _share_of(source) for source, words in SOURCES.items()},
    "tokens equal to LLM only": lambda c: _percent(c.identical_to_llm),
    "texts equal to LLM only": lambda c: _percent(c.exact_match),
    **_TOPIC_ROWS,
    "uplink messages per token": lambda c: f"{c.uplink_messages_per_token:.3f}",
    "  saved": lambda c: _percent(c.transmissions_saved),
    "uplink bytes per token": lambda c: f"{c.uplink_bytes_per_token:,.1f}",
    "cluster bytes per token": lambda c: f"{c.cluster_bytes_per_token:,.1f}",
    "round trips per token": lambda c: f"{c.round_trips_per_token:.3f}",
    "error per token (R-hat)": lambda c: _number(c.risk, 4),
    "  upper limit": lambda c: _number(c.risk_limit, 4),
    "threshold tau, first text": lambda c: _number(c.tau_start, 2),
    "threshold tau, last text": lambda c: _number(c.tau_end, 2),
    "tokens per second": lambda c: f"{c.tokens_per_second:.0f}",
}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"
