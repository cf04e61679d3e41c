"""Tokens a second over real MQTT on slow links, beside the simulator with compute times measured in the same run.

    python benchmarks/throughput/beside.py [--links lan lte nb-iot] [--texts 4] [--tokens 24] [--out DIR]

The agent is in one network namespace; broker, edge and cloud, each a process, are in another one. `slow_link.py` joins
them. Each variant writes its texts over that link. Then the same texts are written in the simulator, whose models take
the time that these calls took on average, and whose parts take the processor's time that these messages took.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from parts import PORT, USER, Measured
from slow_link import ADDRESSES, IP

from fedhlm.decoding.text import encode_prompt
from fedhlm.errors import FedhlmError
from fedhlm.progress import progress
from fedhlm.settings import Config
from fedhlm_lab.papers.findings import ChartSeries, LabChart, LabPanels, LabResult, LabTable
from fedhlm_lab.papers.intervals import SeedMean, mean_of
from fedhlm_lab.papers.pair import LabPair, decoder_of, folder_pair
from fedhlm_lab.papers.report import write
from fedhlm_lab.papers.texts import TextOrder, TimedText, ordered
from fedhlm_lab.sim import links
from fedhlm_lab.sim.pace import CallTally, ModelPace, Paces
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from fedhlm_lab.studies.command_line import COUNT, TEMPERATURE, Parser
from fedhlm_lab.studies.command_line import run as run_study
from fedhlm_zoo.prompts import load_items

HERE: Final = Path(__file__).parent
SETTLE_S: Final = 4.0  # a slow link must have carried the subscriptions
AGREE: Final = 0.10
RETRY: Final = {"generation.retry_ms": "60000"}  # a connection may break on the slowest link, and then a block is lost
VARIANTS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "exact, blocking": ("exact", {"generation.pipeline.kind": "blocking"}),
    "exact": ("exact", {}),
    "exact, tree": ("exact", {"generation.pipeline.kind": "tree"}),
    "budget": ("budget", {}),
    "cu-hlm": ("cu-hlm", {}),
    "hlm": ("hlm", {}),
    "llm-only": ("llm-only", {}),
}
PARTS: Final = ("broker", "edge", "cloud")


class Costs(NamedTuple):
    """Measured compute times: the models', and the seconds that each part takes over a message."""

    paces: Paces
    own_s: dict[str, float]


class Cell(NamedTuple):
    """A variant on a link: texts as they came over the wire and in each simulated fleet, and what was measured.

    `models_only` are those of a fleet in which messages take no processor's time.
    """

    link: str
    variant: str
    real: Sequence[TimedText]
    simulated: Sequence[Sequence[TimedText]]
    models_only: Sequence[TimedText]
    costs: Costs


def speed(texts: Sequence[TimedText]) -> float:
    """Tokens a second."""
    return sum(len(text.ids) for text in texts) / sum(text.seconds for text in texts)


def line_through(calls: Sequence[tuple[int, float]]) -> ModelPace:
    """The pace of a model's calls (tokens, seconds), which keeps their sum: a line, or a constant where they are alike."""
    if not calls:
        return ModelPace(0.0)
    sizes, seconds = np.array([size for size, _ in calls], float), np.array([s for _, s in calls])
    token_s = max(0.0, float(np.polyfit(sizes, seconds, 1)[0])) if np.ptp(sizes) else 0.0
    call_s = float(seconds.mean() - token_s * sizes.mean())
    return ModelPace(call_s, token_s) if call_s > 0.0 else ModelPace(0.0, float(seconds.sum() / sizes.sum()))


def costs_of(measured: dict[str, Measured]) -> Costs:
    """What one variant's texts cost."""
    drafts = measured["agent"].calls
    a_draft_s = sum(seconds for _, seconds in drafts) / max(1, sum(size for size, _ in drafts))
    own_s = {name: part.own_s / max(1, part.messages) for name, part in measured.items()}
    return Costs(Paces(ModelPace(a_draft_s), ModelPace(0.0), line_through(measured["cloud"].calls)), own_s)


class Part:
    """A process of the fleet in a namespace."""

    def __init__(self, stack: ExitStack, namespace: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [IP, "netns", "exec", namespace, sys.executable, *arguments], cwd=HERE, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(self._end)
        if self._line() != "ready":
            raise FedhlmError(f"{' '.join(arguments)} must begin with 'ready'")

    def ask(self, order: Any) -> bytes:
        """Send one line, and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order).decode() + "\n")
        self._process.stdin.flush()
        return self._line().encode()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FedhlmError("a part of the fleet ended by itself")
        return line.strip()

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a loopback device each: the agent's and the others'."""
    names = (f"far-{os.getpid()}", f"near-{os.getpid()}")
    made: list[str] = []
    try:
        for name in names:
            subprocess.run([IP, "netns", "add", name], check=True, capture_output=True)
            made.append(name)
            subprocess.run([IP, "-n", name, "link", "set", "lo", "up"], check=True, capture_output=True)
        yield names
    except (OSError, subprocess.CalledProcessError) as exc:
        why = getattr(exc, "stderr", b"") or str(exc).encode()
        raise FedhlmError(f"two network namespaces need root and iproute2: {why.decode().strip()}") from exc
    finally:
        for name in made:
            subprocess.run([IP, "netns", "delete", name], check=True)


class RealFleet:
    """The fleet on one link. Enter it; it runs until it is left."""

    def __init__(self, stack: ExitStack, link: str) -> None:
        far, near = stack.enter_context(namespaces())
        stack.enter_context(process_of([sys.executable, "slow_link.py", far, near, link]))
        where = {"broker": near, "edge": near, "cloud": near, "agent": far}
        urls = {"agent": url(ADDRESSES[1])}
        self.parts = {
            name: Part(stack, at, "parts.py", name, urls.get(name, url("127.0.0.1"))) for name, at in where.items()
        }

    def write(self, order: TextOrder) -> tuple[list[TimedText], dict[str, Measured]]:
        """Have the texts of an order written, and return them with what was measured."""
        for name in PARTS:
            self.parts[name].ask({})
        answer = msgspec.json.decode(self.parts["agent"].ask(order))
        measured = {name: msgspec.json.decode(self.parts[name].ask({}), type=Measured) for name in PARTS}
        measured["agent"] = msgspec.convert(answer["measured"], Measured)
        return msgspec.convert(answer["texts"], list[TimedText]), measured


@contextmanager
def process_of(command: list[str]) -> Iterator[Any]:
    """A process that says 'ready' when it is, inside the block."""
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise FedhlmError("the slow link cannot be made: it needs root and /dev/net/tun")
            yield process
        finally:
            process.terminate()


def url(host: str) -> str:
    """The broker's URL."""
    return f"mqtt://{USER}:{USER}@{host}:{PORT}"


def simulate(pair: LabPair, link: str, order: TextOrder, costs: Costs, seed: int) -> list[TimedText]:
    """Write the texts of an order in the simulator."""

    async def written() -> list[TimedText]:
        fleet_pair = pair.fleet(paces=costs.paces, tally=CallTally())
        fleet = Fleet(fleet_pair, seed=seed, clusters=1, delay_s=0.0, sessions_max=64, services=Config())
        fleet.broker.pace_s = costs.own_s["broker"]
        for name, part in (("edge-0", "edge"), ("cloud", "cloud")):
            fleet.nodes[name].pace_s = costs.own_s[part]
            fleet.nodes[name].start()
        links.load(link).apply(fleet.link("agent"))
        await asyncio.sleep(1.0)
        async with fleet.online("c0", "agent", fleet_pair.drafter(), pace_s=costs.own_s["agent"]) as agent:
            await asyncio.sleep(order.settle_s)
            texts = await ordered(agent, order, context_max=fleet_pair.context, eos_ids=fleet_pair.eos_ids)
        for node in fleet.nodes.values():
            await node.crash()
        return texts

    return run_virtual(written())


def measure(
    pair: LabPair, names: Sequence[str], order: TextOrder, variants: Sequence[str], runs: int
) -> Iterator[Cell]:
    """Every variant on every link, over the wire and then in `runs` simulated fleets."""
    with progress("links and variants", len(names) * len(variants)) as ended:
        for link in names:
            with ExitStack() as stack:
                fleet = RealFleet(stack, link)
                fleet.write(
                    msgspec.structs.replace(order, preset="exact", prompts=order.prompts[:1])
                )  # opens all caches
                for variant in variants:
                    preset, settings = VARIANTS[variant]
                    wanted = msgspec.structs.replace(order, preset=preset, settings={**settings, **RETRY})
                    real, measured = fleet.write(wanted)
                    costs = costs_of(measured)
                    simulated = [simulate(pair, link, wanted, costs, seed) for seed in range(1, runs + 1)]
                    models_only = simulate(pair, link, wanted, costs._replace(own_s=dict.fromkeys(costs.own_s, 0.0)), 1)
                    yield Cell(Path(link).stem, variant, real, simulated, models_only, costs)
                    ended()


def row_of(cell: Cell) -> tuple[Any, ...]:
    """A row of the table."""
    real, found = speed(cell.real), mean_of([speed(texts) for texts in cell.simulated])
    paces, own = cell.costs.paces, cell.costs.own_s
    return (
        cell.variant, real, str(found), found.mean / real - 1.0,
        "yes" if abs(found.mean / real - 1.0) <= AGREE else "no", speed(cell.models_only) / real - 1.0,
        1000.0 * paces.device.call_s, 1000.0 * paces.large.call_s, 1000.0 * paces.large.token_s,
        *(1000.0 * own[name] for name in ("agent", "broker", "edge", "cloud")),
    )  # fmt: skip


COLUMNS: Final = (
    "variant", "tokens/s over MQTT", "tokens/s simulated", "simulated above it", "within 10 %", "with models' times only", "ms a draft",
    "ms an LLM call", "and a token in it", "ms a message, agent", "broker", "edge", "cloud",
)  # fmt: skip


def result_of(cells: Sequence[Cell], order: TextOrder, runs: int) -> LabResult:
    """Tables and pictures of all cells."""
    names = list(dict.fromkeys(cell.link for cell in cells))
    by_link = {name: [cell for cell in cells if cell.link == name] for name in names}
    tables = [
        LabTable(f"on-{name}", f"On {name}", COLUMNS, [row_of(cell) for cell in found])
        for name, found in by_link.items()
    ]
    panels = [
        LabChart(
            name, name, "variant", "tokens a second", "bars",
            [
                ChartSeries("over MQTT", [SHORT[c.variant] for c in found], [speed(c.real) for c in found]),
                ChartSeries("simulated", [SHORT[c.variant] for c in found], [mean_speed(c).mean for c in found]),
            ],
        )
        for name, found in by_link.items()
    ]  # fmt: skip
    apart = [mean_speed(cell).mean / speed(cell.real) - 1.0 for cell in cells]
    near = sum(abs(difference) <= AGREE for difference in apart)
    sentences = [
        (
            f"{near} of {len(cells)} simulated speeds are within {AGREE:.0%} of those over MQTT; the farthest is "
            f"{max(apart, key=abs):+.1%} from it, the mean distance {np.abs(apart).mean():.1%}."
        ),
        (
            "Each row's fleet was measured and simulated with the compute times of its own calls. Intervals are those of "
            "95 % over simulated fleets, whose jitter and lost packets differ; over MQTT there is one run. The parts ran "
            "before all other programs of the machine."
        ),
        f"{sum(same_texts(cell) for cell in cells)} of {len(cells)} rows have the same ids in every fleet.",
    ]
    facts = {
        "texts": len(order.prompts), "tokens of a text": order.tokens, "temperature": order.temperature,
        "simulated fleets for each row": runs,
    }  # fmt: skip
    return LabResult(
        "throughput",
        "Throughput over MQTT and in the simulator",
        facts,
        sentences,
        [],
        tables,
        [LabPanels("fig-throughput", "Tokens a second", panels)],
    )


SHORT: Final = {
    "exact, blocking": "blocking", "exact": "exact", "exact, tree": "tree", "budget": "budget", "cu-hlm": "cu-hlm",
    "hlm": "hlm", "llm-only": "llm-only",
}  # fmt: skip


def mean_speed(cell: Cell) -> SeedMean:
    """Tokens a second of the simulated fleets."""
    return mean_of([speed(texts) for texts in cell.simulated])


def same_texts(cell: Cell) -> bool:
    """Whether all simulated fleets wrote the same ids as the real one."""
    return all([text.ids for text in texts] == [text.ids for text in cell.real] for texts in cell.simulated)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog="beside.py", description=__doc__)
    parser.add_argument("--links", nargs="+", default=["lan", "lte", "nb-iot"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--texts", type=COUNT, default=4)
    parser.add_argument("--tokens", type=COUNT, default=24)
    parser.add_argument("--runs", type=COUNT, default=5)
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.8)
    parser.add_argument("--out", type=Path, default=Path("lab-results/throughput"))
    options = parser.parse_args(arguments)
    for name in options.links:
        links.load(name, key="--links")
    if os.geteuid() or not Path(IP).exists() or not Path("/dev/net/tun").exists():
        raise FedhlmError("two network namespaces with a slow link need root, iproute2 and /dev/net/tun")
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # the namespaces must not be left
    pair = folder_pair()
    decoder = decoder_of(pair)
    prompts = [
        encode_prompt(decoder.tokenizer, item.title + "\n", decoder.info.bos_id)
        for item in load_items()[: options.texts]
    ]
    order = TextOrder(
        preset="exact", prompts=prompts, tokens=options.tokens, temperature=options.temperature, settle_s=SETTLE_S
    )
    cells: list[Cell] = []
    for cell in measure(pair, options.links, order, options.variants, options.runs):
        cells.append(cell)
        result = result_of(cells, order, options.runs)
        write(result, options.out)  # each time, because the slowest link takes minutes for a row
    print("\n".join([f"{result.title}: {options.out / 'report.md'}", *(f"  {s}" for s in result.sentences)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_study(main, "beside.py"))
