"""Every example does what it says, against a live fleet on both brokers or in a process of its own."""

import asyncio
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edge_agent import gate as gates
from edge_broker.embedded import EmbeddedBroker
from tests import npm
from tests.brokers import MOSQUITTO, Mosquitto
from tests.integration.live import live

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LIMIT_S = 120.0
TEXT = "Oil prices rise"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def ran(*words: str, by: str = sys.executable) -> tuple[int | None, str, str]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        by, *words, stdout=pipe, stderr=pipe, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
async def test_both_clients_get_the_answer(kind: str) -> None:
    if kind == "mosquitto" and MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    broker = Mosquitto() if kind == "mosquitto" else EmbeddedBroker()
    async with broker, live(broker.url) as system:
        whole = await system.ask(TEXT, max_tokens=32, seed=7)
        place = ("127.0.0.1", str(broker.port), "home", "porch", TEXT)
        code, out, err = await ran(str(EXAMPLES / "third_party_client.py"), *place)
        assert (code, err) == (0, "")
        assert out == whole.text + "\n"
        code, out, err = await ran(str(EXAMPLES / "ask_from_python.py"), "porch", TEXT, "--broker", broker.url)
        assert (code, err) == (0, "")
        # It gives no seed, so a text may end by itself before 32 tokens.
        assert re.match(r"(\d+) tokens, \1 from the cloud", out.splitlines()[-1])
        await system.stop("porch")
        code, out, err = await ran(str(EXAMPLES / "ask_from_python.py"), "porch", TEXT, "--broker", broker.url)
        assert (code, out, err) == (1, "", "porch is not there; is its service running?\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
async def test_the_client_in_node_gets_the_answer(kind: str) -> None:
    program = str(npm.installed(EXAMPLES / "node") / "ask.mjs")
    if kind == "mosquitto" and MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    broker = Mosquitto() if kind == "mosquitto" else EmbeddedBroker()
    async with broker, live(broker.url) as system:
        whole = await system.ask(TEXT, max_tokens=32, seed=7)
        assert await ran(program, broker.url, "home", "porch", TEXT, by="node") == (0, f"{whole.text}\n", "")
        assert await ran(program, broker.url, "home", "no name", TEXT, by="node") == (
            1,
            "",
            "no name is not online in home\n",
        )
        await system.stop("porch")
        assert await ran(program, broker.url, "home", "porch", TEXT, by="node") == (
            1,
            "",
            "porch is not online in home\n",
        )
    code, out, err = await ran(program, broker.url, "home", "porch", TEXT, by="node")
    assert (code, out, err) == (1, "", f"{broker.url}: ECONNREFUSED\n")
    assert (await ran(program, by="node"))[0] == 2


def test_the_third_partys_client_needs_nothing_of_ours_and_thirty_lines() -> None:
    source = (EXAMPLES / "third_party_client.py").read_text("utf-8")
    assert "import fedhlm" not in source
    assert "from fedhlm" not in source
    code = [line for line in source.splitlines() if line.strip() and not line.startswith(("#", '"""', "import"))]
    assert len(code) <= 35


def test_an_own_gate_takes_a_place_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "GATES", gates.GATES)
    for name in list(gates.GATES):
        monkeypatch.setitem(gates.GATES, name, gates.GATES[name])
    example = loaded("own_gate.py")
    assert gates.GATES["threshold"] is example.early
    gate = example.early(gates.Settings(threshold=0.6, probability=0.0, seed=3))
    assert gate(0.4, 0)
    assert gate(0.7, 100)
    audited = sum(gate(0.1, position) for position in range(100, 20_100))
    assert 100 < audited < 300


@pytest.mark.slow
async def test_an_agent_runs_with_the_own_gate() -> None:
    async with EmbeddedBroker() as broker, live(broker.url, parts=("edge", "cloud")) as system:
        command = [str(EXAMPLES / "own_gate.py"), "--broker.url", broker.url, "--agent.id", "porch"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, "--agent.threads", "1", env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        try:
            await system.ready("porch")
            answer = await system.ask(TEXT, max_tokens=24, seed=7)
            assert len(answer.ids) == 24
            assert {"local", "cloud"} <= set(answer.sources)
        finally:
            process.terminate()
            assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0


def test_a_replay_gate_lets_through_what_is_decided_as_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "tests" / "golden" / "u-hlm.trace", tmp_path)
    example = loaded("replay_gate/gate.py")
    assert example.failed(tmp_path) == []
    honest = gates.GATES["threshold"]
    monkeypatch.setitem(gates.GATES, "threshold", lambda s: honest(s._replace(threshold=s.threshold + 0.2)))
    assert example.failed(tmp_path) == ["u-hlm.trace"]
    with pytest.raises(SystemExit, match="no recording"):
        example.failed(tmp_path / "empty")


def test_the_workflow_runs_the_gate() -> None:
    text = (EXAMPLES / "replay_gate" / "workflow.yml").read_text("utf-8")
    assert "python examples/replay_gate/gate.py" in text
    assert (EXAMPLES / "replay_gate" / "gate.py").is_file()
