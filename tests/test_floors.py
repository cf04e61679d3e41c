"""Who may import whom: every contract holds for this tree, and would notice a violation."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
ROOMS = ("protocol", "bus", "decoding", "learning", "peers", "process")
# By the first words of a contract's name: imports that it must refuse.
VIOLATIONS = {
    "Floors": (
        "fedhlm -> edge_agent",
        "edge_agent -> edge_broker",
        "edge_broker -> cloud_verifier",
        "edge_agent -> fedhlm_doors",
        "fedhlm_doors -> cloud_verifier",
        "cloud_verifier -> fedhlm_zoo",
        "fedhlm_zoo -> edge_agent",
        "fedhlm_traces -> fedhlm_lab",
        "fedhlm_lab -> fedhlm_fleet",
    ),
    "What travels": (
        "fedhlm.protocol -> fedhlm.decoding",
        "fedhlm.bus -> fedhlm.learning",
        "fedhlm.bus -> fedhlm.peers",
    ),
    "Decoding, learning and peers": (
        "fedhlm.decoding -> fedhlm.learning",
        "fedhlm.learning -> fedhlm.peers",
        "fedhlm.peers -> fedhlm.decoding",
    ),
    "Messages": ("fedhlm.protocol -> fedhlm.bus", "fedhlm.protocol -> fedhlm.process"),
    "Parts and recordings": ("edge_agent -> fedhlm_lab.sim", "fedhlm_traces -> fedhlm_lab.sim"),
    "Torch": ("fedhlm -> torch", "cloud_verifier -> transformers", "fedhlm_lab -> optimum"),
    "HTTP": ("edge_agent -> starlette", "fedhlm_fleet -> uvicorn", "fedhlm -> jinja2"),
    "OpenTelemetry": ("fedhlm -> opentelemetry", "edge_agent -> opentelemetry"),
    "An agent": ("fedhlm -> rich", "edge_agent -> cyclopts", "edge_agent -> scipy"),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    unwrapped = {**os.environ, "COLUMNS": "400"}
    return subprocess.run([program, "--no-cache"], cwd=folder, env=unwrapped, capture_output=True, text=True)


def test_every_package_keeps_to_its_floor() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_contract_is_tried() -> None:
    names = [contract["name"] for contract in CONTRACTS["contracts"]]
    assert [next((v for v in VIOLATIONS if name.startswith(v)), name) for name in names] == list(VIOLATIONS)


@pytest.mark.parametrize(
    ("contract", "violation"), [(name, one) for name, violations in VIOLATIONS.items() for one in violations]
)
def test_a_violation_is_noticed(tmp_path: Path, contract: str, violation: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in (*CONTRACTS["root_packages"], *(f"fedhlm/{room}" for room in ROOMS), "fedhlm_lab/sim"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    importer, _, imported = violation.partition(" -> ")
    (tmp_path / importer.replace(".", "/") / "new.py").write_text(f"import {imported}\n", "utf-8")
    done = lint(tmp_path)
    broken = re.findall(r"^(.+) BROKEN", done.stdout, re.MULTILINE)
    assert any(name.startswith(contract) for name in broken), done.stdout
    assert f"{importer}.new -> {imported}" in done.stdout
