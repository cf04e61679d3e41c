"""With each part and without it: toy fleets, what is compared with what, and what the report says."""

import random
from collections.abc import Callable

import pytest

from edge_broker.service import EdgeService
from fedhlm.errors import ConfigError
from fedhlm_lab.papers import ablations
from fedhlm_lab.papers.ablations import AblationPoint, AblationRuns, System, dealt, prompts_needed, systems_of
from fedhlm_lab.papers.ablations_figures import QUANTITIES, AblationFindings, result_of, worth_of
from fedhlm_lab.papers.desk import Desk, WrittenTexts, running
from fedhlm_lab.papers.experiment import AblatedPart, AblationsExperiment, AblationWorkload, LabSample
from fedhlm_lab.papers.findings import LabPanels
from fedhlm_lab.papers.intervals import SeedMean, mean_of
from fedhlm_lab.papers.quantities import AGREES, KEPT, SENT, SPEED, UP
from fedhlm_lab.papers.report import markdown
from fedhlm_lab.papers.workloads import LabPrompts
from fedhlm_lab.sim import links, toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from tests.fedhlm_lab.papers import toys

SHIPPED = AblationsExperiment.load("ablations")
ASYNC, TREE = (part for part in SHIPPED.parts if part.preset == "exact")
CACHE, PEERS, _ = (part for part in SHIPPED.parts if part.preset == "fedhlm")
(FEDERATION,) = (part for part in SHIPPED.parts if (part.preset, part.name) == ("budget", "federation"))
FEW = {"continue": AblationWorkload("few texts", warm=8, texts=8, tokens=10)}


def experiment(*parts: AblatedPart, **changes: object) -> AblationsExperiment:
    """The shipped one, smaller."""
    small = {"parts": parts, "workloads": FEW, "links": ("lte", "lan"), "seeds": 2, **changes}
    return AblationsExperiment.load("ablations", LabSample(parameters=small))


def prompts(count: int, tokens: int = 4) -> dict[str, LabPrompts]:
    rng = random.Random(1)
    ids = [[rng.randrange(1, toy.VOCAB_SIZE) for _ in range(tokens)] for _ in range(count)]
    return {"continue": LabPrompts("toy texts", ids)}


@pytest.fixture(scope="module")
def runs() -> AblationRuns:
    return ablations.run(experiment(ASYNC, TREE, CACHE), toys.pair(), prompts(48))


def test_seeds_learn_from_the_same_texts_and_count_different_ones() -> None:
    made, wanted = experiment(CACHE, seeds=3), FEW["continue"]
    needed = prompts_needed(made, wanted, made.seeds)
    found = [dealt(made, wanted, seed, [[number] for number in range(needed)]) for seed in (1, 2, 3)]
    assert [sorted(to_learn) for to_learn, _ in found] == [[[n] for n in range(wanted.warm)]] * 3
    assert found[0][0] != found[1][0]
    counted = [prompt for _, shares in found for link in made.links for prompt in shares[link]]
    assert counted == [[number] for number in range(wanted.warm, needed)]
    few = dealt(made, wanted, 3, [[number] for number in range(prompts_needed(made, wanted))])
    assert all(len(share) == wanted.texts for share in few[1].values())  # texts take turns


def test_every_system_runs_once_on_every_link_with_every_seed(runs: AblationRuns) -> None:
    systems = {system for part in runs.experiment.parts for system in systems_of(part)}
    assert len(systems) == 5  # async and tree have the same system without them
    expected = {(system, "continue", link, seed) for system in systems for link in ("lte", "lan") for seed in (1, 2)}
    assert len(runs.points) == len(expected)
    assert {(p.system, p.workload, p.link, p.seed) for p in runs.points} == expected
    assert all(p.written.texts == 8 for p in runs.points)


def test_pipelines_change_the_time_and_not_the_text(runs: AblationRuns) -> None:
    found = AblationFindings(runs)
    for part in (ASYNC, TREE):
        for link in found.links:
            agrees = found.worth(AGREES, part, "continue", link)
            assert agrees.same
            assert agrees.with_it.mean == 1.0
            assert found.worth(KEPT, part, "continue", link).same
    assert found.worth(UP, TREE, "continue", "lte").gain.mean > 0.0  # a tree has alternatives
    assert not found.worth(SPEED, ASYNC, "continue", "lte").same


def memories(fleet: Fleet, _desk: Desk) -> int:
    edges = [node.service for node in fleet.nodes.values() if isinstance(node.service, EdgeService)]
    return sum(edge.memory.size for edge in edges)


def known_agents(_fleet: Fleet, desk: Desk) -> int:
    return sum(len(agent.peers.centroid.peers) for agent in desk.agents.values())


def contributions(_fleet: Fleet, desk: Desk) -> int:
    return sum(agent.learner.round for agent in desk.agents.values())


@pytest.mark.parametrize(("part", "shown"), [(CACHE, memories), (PEERS, known_agents), (FEDERATION, contributions)])
def test_a_part_that_is_off_does_nothing(part: AblatedPart, shown: Callable[[Fleet, Desk], int]) -> None:
    async def after_texts(*, off: bool) -> int:
        config = systems_of(part)[off].config
        async with (
            running(toys.pair().fleet(), config, seed=1, clusters=2) as fleet,
            Desk(fleet, config, agents=4, tokens=12, clusters=2) as desk,
        ):
            await desk.write([[5, 6, number] for number in range(1, 17)])
            return shown(fleet, desk)

    assert run_virtual(after_texts(off=False)) > 0
    assert run_virtual(after_texts(off=True)) == 0


def test_edges_and_cloud_are_on_a_lan() -> None:
    async def delays() -> dict[str, float]:
        config = System("exact").config
        async with running(toys.pair().fleet(), config, seed=1, clusters=2) as fleet:
            return {name: link.delay_s for name, link in fleet.links.items()}

    found = run_virtual(delays())
    assert set(found) == {"cloud", "edge-c0-up", "edge-c0-down", "edge-c1-up", "edge-c1-down"}
    assert set(found.values()) == {links.load("lan").delay_ms / 1000.0}


def test_the_shipped_parts_each_change_what_they_name() -> None:
    changed = {(part.preset, part.name): tuple(part.without) for part in SHIPPED.parts}
    assert len(changed) == len(SHIPPED.parts)
    for part in SHIPPED.parts:
        with_it, without = systems_of(part)
        assert with_it.config != without.config
    assert SHIPPED.seeds >= 5


def point(system: System, link: str, seed: int, sent: float, agreed: int = 90) -> AblationPoint:
    return AblationPoint(
        system, "continue", link, seed, WrittenTexts(1, 100, agreed, 0, {"local": 20}, 1.0, 0.1, sent, 1.0, 1.0, 1, 1)
    )


def test_differences_are_paired_by_seed() -> None:
    base = {1: 10.0, 2: 50.0, 3: 90.0}  # seeds differ far more than the systems
    found = worth_of("x", "lte", {s: v - 2.0 for s, v in base.items()}, base, more=False)
    assert [*found.gain] == pytest.approx([-2.0, 0.0])
    assert found.apart
    assert found.better
    assert not worth_of("x", "lte", base, base, more=False).apart
    crossed = worth_of("x", "lte", {1: 11.0, 2: 48.0, 3: 92.0}, base, more=True)
    assert not crossed.apart
    assert crossed.gain == mean_of([1.0, -2.0, 2.0])


def test_the_report_tells_what_is_better_and_worse_from_the_figures() -> None:
    with_it, without = systems_of(CACHE)
    points = [
        point(system, link, seed, sent, agreed)
        for link in ("lte", "lan")
        for seed in (1, 2, 3)
        for system, sent, agreed in ((with_it, 20.0 + seed, 90), (without, 30.0 + seed, 95))
    ]
    made = experiment(CACHE, seeds=3)
    result = result_of(AblationRuns(made, {"continue": "toy texts"}, points, {}))
    text = markdown(result)
    assert "better are messages up a token on lte 0.22 instead of 0.32 (-0.1)" in text
    assert "worse are tokens as the LLM on lte 0.9 instead of 0.95 (-0.05)" in text
    assert "Of 4 differences that are not 0 in every seed, 4 have an interval apart from 0" in text
    rows = {row[3]: row[4:] for row in result.tables[0].rows}
    gains = [cell.mean for cell in rows["lte"] if isinstance(cell, SeedMean)]
    assert gains == pytest.approx([-0.05, -0.1, 0, 0, 0, 0, 0, 0])
    assert rows["lte"][-2:] == (None, "tokens as the LLM, messages up a token")
    (chart,) = result.charts
    assert isinstance(chart, LabPanels)
    assert [panel.title for panel in chart.panels] == [quantity.name for quantity in QUANTITIES]
    shares = {panel.title: panel.series[0].y[0] for panel in chart.panels}
    assert shares[AGREES.name] == pytest.approx(-5.0)  # of a hundred tokens
    assert shares[SENT.name] == pytest.approx(-100.0 * 0.1 / 0.32)


def test_a_certificates_limit_is_compared_where_both_systems_have_one() -> None:
    part = SHIPPED.parts[0]
    with_it, without = systems_of(part)
    seeds, points = (1, 2), [point(s, "lte", seed, 1.0) for s in (with_it, without) for seed in (1, 2)]
    limits = {(s, "continue", seed): 0.01 * seed + up for s, up in ((with_it, 0.0), (without, 0.02)) for seed in seeds}
    made = experiment(part, links=("lte",))
    found = AblationFindings(AblationRuns(made, {"continue": ""}, points, limits))
    limit = found.limit(part, "continue")
    assert limit is not None
    assert limit.gain.mean == pytest.approx(-0.02)
    assert limit.better
    assert AblationFindings(AblationRuns(made, {}, points, {})).limit(part, "continue") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "exakt"}, r"parts.preset must be one of .* \(got 'exakt'\)"),
        ({"without": {}}, "cache.without must be settings that switch the part off"),
        ({"without": {"generation.votes": "1"}}, "generation.votes"),
        ({"workloads": ("talk",)}, r"cache.workloads must be one of continue \(got 'talk'\)"),
    ],
)
def test_an_impossible_part_is_refused(changes: dict[str, object], words: str) -> None:
    fields = {f: getattr(CACHE, f) for f in CACHE.__struct_fields__}
    with pytest.raises(ConfigError, match=words):
        ablations.run(experiment(AblatedPart(**{**fields, **changes})), toys.pair(), prompts(1))


def test_an_unknown_link_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"links must be one of .* \(got 'ltee'\)"):
        ablations.run(experiment(CACHE, links=("ltee",)), toys.pair(), prompts(1))
