"""FedHLM's pipeline for Kubeflow (arXiv 2507.00082, Fig. 3): compile it, or run it here.

It needs an environment of its own, because kfp and the project need different versions of protobuf:

    python -m venv /tmp/kfp && /tmp/kfp/bin/pip install -r deploy/kubeflow/requirements.txt
    PYTHONPATH=. /tmp/kfp/bin/python deploy/kubeflow/pipeline.py compile deploy/kubeflow/pipeline.yaml
    PYTHONPATH=. /tmp/kfp/bin/python deploy/kubeflow/pipeline.py run /tmp/kfp-outputs

`run` takes kfp's local runner, which starts a process for each step. On a cluster each step runs in the image of its
part with kfp on top (`Dockerfile` in this folder).
"""

import json
import sys
from pathlib import Path

from kfp import compiler, dsl, local

VERSION = "0.1.0"
AGENT, EDGE, CLOUD = (f"fedhlm/{part}:{VERSION}-kfp" for part in ("agent", "edge", "cloud"))
ROUNDS = 2
TEXTS = [
    "Oil prices rise on supply fears\nTopic:",
    "Striker signs a new contract\nTopic:",
    "Chip maker opens a research lab\nTopic:",
    "Ministers meet for peace talks\nTopic:",
    "Shares fall after a weak report\nTopic:",
    "Team wins the cup on penalties\nTopic:",
    "Satellite maps the sea floor\nTopic:",
    "Voters go to the polls on Sunday\nTopic:",
]


@dsl.component(base_image=AGENT, install_kfp_package=False)
def slm_inference(texts: list, clients: int, drafts: dsl.Output[dsl.Dataset]):  # type: ignore[type-arg, no-untyped-def]
    """Draft a token after every text, with its doubt."""
    from fedhlm_fleet import kubeflow

    kubeflow.write(kubeflow.draft(texts, clients), drafts.path)


@dsl.component(base_image=AGENT, install_kfp_package=False)
def routing(drafts: dsl.Input[dsl.Dataset], tau: float, routed: dsl.Output[dsl.Dataset]):  # type: ignore[no-untyped-def]
    """Keep drafts, or send them to the LLM."""
    from fedhlm_fleet import kubeflow

    found = kubeflow.route(kubeflow.read("drafts", drafts.path), tau or kubeflow.start(), [])
    kubeflow.write(found, routed.path)


@dsl.component(base_image=AGENT, install_kfp_package=False)
def routing_with_cache(  # type: ignore[no-untyped-def]
    drafts: dsl.Input[dsl.Dataset],
    tau: float,
    earlier: dsl.Input[dsl.Dataset],
    routed: dsl.Output[dsl.Dataset],
):
    """Keep drafts, reuse what an earlier round verified in a near context, or send them to the LLM."""
    from fedhlm_fleet import kubeflow

    verified = kubeflow.read("report", earlier.path).verified
    kubeflow.write(kubeflow.route(kubeflow.read("drafts", drafts.path), tau, verified), routed.path)


@dsl.component(base_image=CLOUD, install_kfp_package=False)
def llm_fallback(routed: dsl.Input[dsl.Dataset], settled: dsl.Output[dsl.Dataset]):  # type: ignore[no-untyped-def]
    """Settle what was sent with the LLM."""
    from fedhlm_fleet import kubeflow

    kubeflow.write(kubeflow.fall_back(kubeflow.read("routed", routed.path)), settled.path)


@dsl.component(base_image=AGENT, install_kfp_package=False)
def validation(  # type: ignore[no-untyped-def]
    routed: dsl.Input[dsl.Dataset], settled: dsl.Input[dsl.Dataset], report: dsl.Output[dsl.Dataset]
):
    """Count who settled what, and note the observations for the thresholds."""
    from fedhlm_fleet import kubeflow

    found = kubeflow.validate(kubeflow.read("routed", routed.path), kubeflow.read("settled", settled.path))
    kubeflow.write(found, report.path)


@dsl.component(base_image=AGENT, install_kfp_package=False)
def threshold_optimisation(  # type: ignore[no-untyped-def]
    report: dsl.Input[dsl.Dataset], tau: float, number: int, clients: int, thresholds: dsl.Output[dsl.Dataset]
):
    """Each client's step by equation (6)."""
    from fedhlm_fleet import kubeflow

    found = kubeflow.optimise(kubeflow.read("report", report.path), tau or kubeflow.start(), number, clients)
    kubeflow.write(found, thresholds.path)


@dsl.component(base_image=EDGE, install_kfp_package=False)
def aggregation(thresholds: dsl.Input[dsl.Dataset], tau: float, clusters: int) -> float:
    """Equations (7) and (8): the threshold of the next round."""
    from fedhlm_fleet import kubeflow

    return kubeflow.aggregate(kubeflow.read("local", thresholds.path), tau or kubeflow.start(), clusters)


@dsl.pipeline(name="fedhlm", description="FedHLM as published: draft, route, fall back, validate, optimise, aggregate.")
def fedhlm(texts: list = TEXTS, clients: int = 4, clusters: int = 2) -> float:  # type: ignore[type-arg]
    """The rounds one after the other. A threshold of 0 stands for the preset's own, before the first round."""
    tau, earlier = 0.0, None
    for number in range(ROUNDS):
        drafts = slm_inference(texts=texts, clients=clients).outputs["drafts"]
        routed = (
            routing(drafts=drafts, tau=tau)
            if earlier is None
            else routing_with_cache(drafts=drafts, tau=tau, earlier=earlier)
        ).outputs["routed"]
        settled = llm_fallback(routed=routed).outputs["settled"]
        earlier = validation(routed=routed, settled=settled).outputs["report"]
        steps = threshold_optimisation(report=earlier, tau=tau, number=number, clients=clients).outputs["thresholds"]
        tau = aggregation(thresholds=steps, tau=tau, clusters=clusters).output
    return tau


def main(command: str, path: str) -> int:
    """Compile to a file, or run with kfp's local runner and print what each step made."""
    if command == "compile":
        compiler.Compiler().compile(fedhlm, path)
        return 0
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=path, raise_on_error=True)
    task = fedhlm()
    for report in sorted(Path(path).rglob("report")):
        found = json.loads(report.read_text("utf-8"))
        print(f"{report.parent.name}: {found['settled']}, {len(found['observed'])} observed")
    print(f"threshold after {ROUNDS} rounds: {task.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
