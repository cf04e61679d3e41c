"""What a device must not load: the ground floor and the agent run on five libraries, whatever else is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "cyclopts",
    "datasets",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "onnx",
    "optimum",
    "pandas",
    "prometheus_client",
    "rich",
    "scipy",
    "sklearn",
    "starlette",
    "torch",
    "transformers",
    "uvicorn",
}


def modules_of(package: str) -> list[str]:
    """Dotted names of all modules of a package."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level packages in memory after a fresh interpreter imported `modules`."""
    code = f"import importlib, json, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return set(found)


@pytest.mark.parametrize("package", ["fedhlm", "edge_agent"])
def test_a_device_loads_nothing_heavy(package: str) -> None:
    modules = modules_of(package)
    assert package in modules
    found = loaded_by(modules)
    assert package in found
    assert not found & HEAVY


def test_configuration_and_messages_need_no_model_runtime() -> None:
    found = loaded_by(["fedhlm", "fedhlm.protocol.messages", "fedhlm.config", "fedhlm.telemetry", "fedhlm.errors"])
    assert not found & (HEAVY | {"onnxruntime", "tokenizers", "aiomqtt"})


def test_the_edge_needs_no_model_runtime() -> None:
    assert not loaded_by(modules_of("edge_broker")) & ({"onnxruntime", "tokenizers", "torch", "transformers"})


def test_the_guard_sees_what_is_loaded() -> None:
    assert "rich" in loaded_by(["rich"])
