"""The rule of floors: it holds for this tree, and the checker would notice if it did not."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "fedhlm",
    "edge_agent",
    "edge_broker",
    "cloud_verifier",
    "fedhlm_fleet",
    "fedhlm_lab",
    "fedhlm_traces",
    "fedhlm_zoo",
)
VIOLATIONS = {
    "fedhlm": ("edge_agent", "rich"),
    "edge_agent": ("edge_broker", "torch", "cyclopts"),
    "edge_broker": ("cloud_verifier", "transformers"),
    "cloud_verifier": ("fedhlm_zoo", "optimum"),
    "fedhlm_zoo": ("edge_agent", "fedhlm_fleet"),
    "fedhlm_lab": ("fedhlm_fleet", "torch"),
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_every_package_keeps_to_its_floor() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_kind_of_violation_is_noticed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        lines = [f"import {name}" for name in VIOLATIONS.get(package, ())]
        (tmp_path / package / "__init__.py").write_text("\n".join(lines), "utf-8")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for package, names in VIOLATIONS.items():
        for name in names:
            assert f"{package} -> {name}" in done.stdout
