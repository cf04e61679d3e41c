"""Images and bundles install files with known hashes only, and the locks agree with pyproject.toml and constraints.txt."""

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedhlm_fleet.flash import bundle
from fedhlm_fleet.flash.plan import FlashError

ROOT: Final = Path(__file__).parents[2]
DOCKER: Final = ROOT / "deploy" / "docker"
LOCKS: Final = sorted((DOCKER / "locks").glob("*.txt"))
ASKED: Final = {
    "agent": ("agent", "serve", "otel"),
    "bundle": ("agent",),
    "cloud.onnxruntime": ("cloud", "otel"),
    "cloud.onnxruntime-gpu": ("cloud", "otel"),
    "edge": ("edge", "otel"),
    "init": ("operator",),
}


def locked(path: Path) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each distribution."""
    found: dict[str, tuple[str, int]] = {}
    for entry in path.read_text("utf-8").replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split("--hash=sha256:")
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest.strip()) for digest in hashes), entry
        name, _, rest = requirement.partition("==")
        found[canonicalize_name(name)] = (rest.split(";")[0].strip(), len(hashes))
    return found


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_locked_version_is_the_pinned_one_and_has_hashes(path: Path) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    pinned: dict[str, str] = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)
    }
    pinned |= {"onnxruntime-gpu": pinned["onnxruntime"]}
    for name, (version, hashes) in locked(path).items():
        assert hashes > 0, name
        assert name == "pip" or pinned[name] == version, f"{name}: run deploy/docker/lock"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_holds_all_that_its_part_needs(path: Path) -> None:
    command = [sys.executable, str(DOCKER / "requirements.py"), *ASKED[path.stem]]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    held = locked(path)
    todo = [Requirement(line) for line in asked]
    seen: set[str] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        locked_as = "onnxruntime-gpu" if name == "onnxruntime" and path.stem.endswith("-gpu") else name
        assert locked_as in held, f"{name}: run deploy/docker/lock"
        assert requirement.specifier.contains(held[locked_as][0]), str(requirement)
        if name not in seen:
            seen.add(name)
            todo += [Requirement(line) for line in metadata.requires(name) or ()]


def test_every_image_installs_by_hashes() -> None:
    assert set(ASKED) == {path.stem for path in LOCKS}
    for path in sorted(DOCKER.glob("*.Dockerfile")):
        text = path.read_text("utf-8").replace("\\\n", " ")
        for words in re.findall(r"\binstall (-.*?)(?:&&|\n)", text):
            if "-d -o" not in words:
                assert "--require-hashes" in words or "--no-deps --prefix /opt/code ." in words, path


def test_another_file_of_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle is filled by pip, from wheels that somebody has put in place of the index's."""
    version = locked(DOCKER / "locks" / "bundle.txt")["msgspec"][0]
    name = f"msgspec-{version}-py3-none-any.whl"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        info = f"msgspec-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: msgspec\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    lock = tmp_path / "lock.txt"
    entry = re.search(
        r"^msgspec==.*?(?=^\S)", (DOCKER / "locks" / "bundle.txt").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert entry is not None
    lock.write_text(entry[0], "utf-8")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FlashError, match=r"(?i)hash"):
        bundle._pip("download", "--dest", str(tmp_path / "out"), "--isolated", "--no-index", "--find-links", str(tmp_path),
                    "--require-hashes", "--requirement", str(lock))  # fmt: skip
