"""`fedhlm simulate`: sums up, names what fails, saves it and runs it again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from cloud_verifier.engine import EngineInput, EngineOutput
from fedhlm_fleet.cli import main
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.sweep import SweepPlan, Totals, sweep
from tests.processes import GONE_S, marked, obey_interrupts, until_gone

SMALL = ["--agents", "2", "--tokens", "6", "--prompts", "1"]


def test_the_summary_counts_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    code = main(
        ["simulate", *SMALL, "--seeds", "0..3", "--preset", "exact,llm-only", "--link", "lan,lte", "--json", str(file)]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert "seeds      4, failed 0" in printed
    figures = json.loads(file.read_text())
    assert figures["seeds"] == 4
    assert figures["failed"] == 0
    assert figures["violations"] == []
    assert sum(figures["tokens"].values()) >= 4 * 2 * 2
    assert set(figures["faults"]) == {
        "drop", "duplicate", "reorder", "spikes", "partition", "crash", "crash-disk", "skew", "slow", "full", "liar",
    }  # fmt: skip
    assert figures["messages"] > 100
    assert figures["virtual_hours"] > 0
    assert "simulated" not in {p.name for p in tmp_path.iterdir()}


def test_a_failure_is_named_shrunk_saved_and_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = toy.large_forward

    async def crooked(requests: Sequence[EngineInput], *, step_s: float = 0.02) -> list[EngineOutput]:
        return [o._replace(logits=-o.logits) for o in await honest(requests, step_s=step_s)]

    with monkeypatch.context() as broken:
        broken.setattr(toy, "large_forward", crooked)
        words = ["simulate", *SMALL, "--seeds", "2", "--shrink", "--out", str(tmp_path)]
        assert main(words) == 1
        told = capsys.readouterr()
        assert "VIOLATED   source: 1 seeds" in told.out
        assert "fedhlm simulate --preset exact --agents 2" in told.err
        assert "events shrunk to 0 in" in told.err
        assert "exact: 1 agents in 1 clusters, 1 prompts of 1 tokens" in told.err
        [path] = tmp_path.iterdir()
        assert f"fedhlm simulate --again {path}" in told.err
        assert main(["simulate", "--again", str(path)]) == 1
        assert "source: token 0 of" in capsys.readouterr().err
        assert main(words) == 1
        assert {p.name for p in tmp_path.iterdir()} == {"seed-2.trace", "seed-2-2.trace"}
        capsys.readouterr()
    assert main(["simulate", "--again", str(path)]) == 0
    assert "every invariant holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seeds", "5..3"], "--seeds must be "),
        (["--seeds", "x"], "--seeds must be "),
        (["--seeds", "3.."], "--seeds must be "),
        (["--link", "lan,mars"], "--link must be "),
        (["--upstream", "mars"], "--upstream must be "),
        (["--faults", "rain"], "--faults must be "),
        (["--preset", "exakt"], "did you mean 'exact'"),
        (["--set", "tokens"], "--set must be KEY=VALUE (got 'tokens')"),
        (["--set", "generation.tau=2"], "generation.tau must be "),
        (["--again", "none.trace"], "none.trace"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words]) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert len(told.splitlines()) == 1


def test_two_processes_find_what_one_finds() -> None:
    plan = SweepPlan(presets=("exact", "llm-only"), links=("lte",), agents=2, tokens=6, prompts=1)

    def figures(jobs: int) -> dict[str, object]:
        totals = Totals()
        for ended in sweep(plan, range(4), jobs=jobs):
            totals.add(ended)
        return totals.figures(0.0)

    assert figures(2) == figures(1)


def test_the_command_told_for_a_seed_makes_the_same_scenario() -> None:
    plan = SweepPlan(presets=("exact", "budget"), links=("lan", "lte"), faults="drop=0.2,crash", deadline_s=2.0)
    for seed in range(8):
        scenario = plan.scenario(seed)
        alone = SweepPlan(
            presets=(scenario.preset,),
            links=(plan.link_of(seed),),
            faults=plan.faults,
            deadline_s=2.0,
            settings=scenario.settings,
        )
        assert alone.scenario(seed) == scenario
        assert f"--preset {scenario.preset} " in plan.command(seed)
        assert all(f"--set {setting}" in plan.command(seed) for setting in scenario.settings)


ENDLESS = """
from fedhlm_lab.sim.sweep import SweepPlan, sweep
if __name__ == "__main__":
    for ended in sweep(SweepPlan(presets=("exact",), links=("lan",), agents=2, prompts=1, tokens=6), range(10**9), jobs=2):
        print(ended.seed, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(number: int, tmp_path: Path) -> None:
    marker = f"simulate-test-{os.getpid()}-{number}"
    script = tmp_path / "endless.py"  # workers import what started them
    script.write_text(ENDLESS, "utf-8")
    environ = {**os.environ, "SIMULATE_TEST_MARKER": marker, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        for _ in range(20):  # by then both are at work
            assert process.stdout.readline()
        process.send_signal(number)
        assert process.wait(GONE_S) == -number
    assert until_gone(marker) == []


@pytest.mark.slow
def test_ctrl_c_ends_the_command_and_its_workers_without_a_traceback() -> None:
    marker = f"simulate-test-{os.getpid()}-interrupted"
    with subprocess.Popen(
        [sys.executable, "-m", "fedhlm_fleet.cli", "simulate", *SMALL, "--seeds", "0..99999", "--jobs", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SIMULATE_TEST_MARKER": marker},
        preexec_fn=obey_interrupts,  # noqa: PLW1509 - no threads here
        start_new_session=True,
    ) as process:
        end_s = time.monotonic() + GONE_S
        while len([line for line in marked(marker) if "spawn_main" in line]) < 2:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all of them
        _, errors = process.communicate(timeout=GONE_S)
    assert process.returncode == 130
    assert errors == ""
    assert until_gone(marker) == []
