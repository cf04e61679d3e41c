"""The pipeline for Kubeflow: its steps compute what the live parts do, and its compiled file is made from its source."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from fedhlm.decoding.alone import Alone
from fedhlm.protocol.messages import Sampling
from fedhlm_fleet import kubeflow
from fedhlm_zoo.shipped import model_folder

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubeflow"
CLIENTS, CLUSTERS = 3, 2
STEPS = {  # of Fig. 3, with the part whose image each runs in
    "slm-inference": "agent",
    "routing": "agent",
    "llm-fallback": "cloud",
    "validation": "agent",
    "threshold-optimisation": "agent",
    "aggregation": "edge",
}


def compiled() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "pipeline.yaml").read_text("utf-8"))
    return found


def executors() -> dict[str, dict[str, Any]]:
    """The containers of the compiled pipeline by the names of their steps."""
    found: dict[str, dict[str, Any]] = compiled()["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): one["container"] for name, one in found.items()}


def step_of(name: str) -> str:
    """The name of a step without the number of its round, and of its form."""
    return name.rstrip("-0123456789").removesuffix("-with-cache")


def functions() -> dict[str, str]:
    """The source of each component of pipeline.py, without its decorator."""
    text = (FOLDER / "pipeline.py").read_text("utf-8")
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and any("component" in ast.unparse(d) for d in node.decorator_list):
            found[node.name.replace("_", "-")] = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    return found


def test_the_compiled_pipeline_has_the_steps_of_the_paper_in_the_images_of_the_parts() -> None:
    found = {step_of(name): container["image"] for name, container in executors().items()}
    assert found.keys() == STEPS.keys()
    compose = (ROOT / "docker-compose.yml").read_text("utf-8")
    for step, image in found.items():
        part, _, version = image.removeprefix("fedhlm/").partition(":")
        assert part == STEPS[step]
        assert f"${{IMAGES:-fedhlm}}/{part}:${{VERSION:-{version.removesuffix('-kfp')}}}" in compose


def test_the_compiled_pipeline_was_made_from_its_source() -> None:
    sources = functions()
    made = {name: container["command"] for name, container in executors().items()}
    known = {name.rstrip("-0123456789") for name in made}
    assert known == sources.keys()
    for name, arguments in made.items():
        body = sources[name.rstrip("-0123456789")].partition("\n")[2]
        assert body.rpartition('"""')[2].strip() in "\n".join(arguments)


def test_each_round_waits_for_the_one_before() -> None:
    tasks = compiled()["root"]["dag"]["tasks"]
    assert tasks["routing-with-cache"]["dependentTasks"] == ["aggregation", "slm-inference-2", "validation"]
    assert tasks["llm-fallback"]["dependentTasks"] == ["routing"]


@pytest.mark.parametrize("absent", ["onnxruntime,tokenizers,fedhlm_zoo,edge_agent,cloud_verifier", "cloud_verifier"])
def test_a_step_needs_no_more_than_the_image_of_its_part_has(absent: str) -> None:
    program = (
        f"import sys; sys.modules |= dict.fromkeys({absent.split(',')!r}); from fedhlm_fleet import kubeflow as k; "
        "print(k.aggregate([k.LocalThreshold(0, 0.5, 3), k.LocalThreshold(1, 0.7, 1)], 0.3, 1), "
        "len(k.draft(['Oil'], 1)) if 'edge_agent' not in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0.55", "1" if absent == "cloud_verifier" else "0"], done.stderr


@pytest.fixture(scope="module")
def drafts() -> list[kubeflow.DraftedToken]:
    texts = ["Oil prices rise\n", "A new chip\n", "The cup final\n", "Peace talks\n", "Shares fall\n", "Rain in May\n"]
    return kubeflow.draft(texts, CLIENTS)


def test_a_round_settles_every_token_and_moves_the_threshold(
    drafts: list[kubeflow.DraftedToken], tmp_path: Path
) -> None:
    tau = kubeflow.start()
    routed = kubeflow.route(drafts, tau, [])
    settled = kubeflow.fall_back(routed)
    llm = Alone.load(model_folder("", "llm"), threads=1)
    for one in settled:
        ids = routed[one.place].draft.ids
        assert [one.token] == llm.write(ids, Sampling(0, 0.0, coupling="greedy"), 1)
    report = kubeflow.validate(routed, settled)
    assert report.settled["cloud"] == len(settled) == len(report.observed) > 0
    assert sum(report.settled.values()) == len(drafts)
    local = kubeflow.optimise(report, tau, 0, CLIENTS)
    assert sum(one.tokens for one in local) == len(settled)
    after = kubeflow.aggregate(local, tau, CLUSTERS)
    assert tau < after < 1.0
    for kind, made in (
        ("drafts", drafts),
        ("routed", routed),
        ("settled", settled),
        ("report", report),
        ("local", local),
    ):
        kubeflow.write(made, str(tmp_path / kind))
        assert kubeflow.read(kind, str(tmp_path / kind)) == made


def test_nothing_is_sent_above_the_threshold_and_what_was_verified_is_reused(
    drafts: list[kubeflow.DraftedToken],
) -> None:
    kept = kubeflow.route(drafts, 1.0, [])
    assert {one.source for one in kept} == {"local"}
    assert kubeflow.fall_back(kept) == []
    report = kubeflow.validate(kept, [])
    assert kubeflow.aggregate(kubeflow.optimise(report, 0.7, 0, CLIENTS), 0.7, CLUSTERS) == 0.7
    doubtful = next(one for one in kubeflow.route(drafts, -1.0, []) if not one.source).draft
    (reused,) = kubeflow.route([doubtful], -1.0, [(doubtful.key, doubtful.token)])
    assert reused.source == "peer"
    (other,) = kubeflow.route([doubtful], -1.0, [(doubtful.key, doubtful.token + 1)])
    assert other.source == ""
