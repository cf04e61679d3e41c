"""The bundle: only wheels that run on the device, all that an agent needs, and no network where it is complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedhlm.errors import ConfigError
from fedhlm_fleet.flash import bundle
from fedhlm_fleet.flash.plan import FlashError
from tests.fedhlm_fleet.flash import cards

GOOD = [
    "numpy-2.4.6-cp313-cp313-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
    "tokenizers-0.22.2-cp39-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
    "flatbuffers-25.12.19-py2.py3-none-any.whl",
    "zstandard-0.25.0-1-cp313-cp313-manylinux2014_aarch64.whl",
]
BAD = [
    "numpy-2.4.6-cp311-cp311-manylinux_2_28_aarch64.whl",
    "numpy-2.4.6-cp313-cp313-manylinux_2_28_x86_64.whl",
    "numpy-2.4.6-cp313-cp313-macosx_11_0_arm64.whl",
    "numpy-2.4.6-cp313-cp313t-manylinux_2_28_aarch64.whl",
    "tokenizers-0.22.2-cp314-abi3-manylinux_2_17_aarch64.whl",
    "old-1.0-py2-none-any.whl",
]


@pytest.mark.parametrize("name", GOOD)
def test_wheels_of_the_device_are_taken(name: str, tmp_path: Path) -> None:
    package = name.partition("-")[0]
    cards.wheels(tmp_path, leave_out=(package,))
    (tmp_path / name).touch()
    assert name in {path.name for path in bundle.wheels(tmp_path, python="3.13")}


@pytest.mark.parametrize("name", BAD)
def test_wheels_of_another_machine_are_refused_by_name(name: str, tmp_path: Path) -> None:
    cards.wheels(tmp_path, leave_out=(name.partition("-")[0],))
    (tmp_path / name).touch()
    with pytest.raises(FlashError, match=re.escape(name)):
        bundle.wheels(tmp_path, python="3.13")


@pytest.mark.parametrize("name", bundle.NEEDED)
def test_a_missing_wheel_is_named(name: str, tmp_path: Path) -> None:
    cards.wheels(tmp_path, leave_out=(name,))
    with pytest.raises(FlashError, match=f"lacks wheels of {name}"):
        bundle.wheels(tmp_path, python="3.13")


def test_two_versions_of_one_are_refused(tmp_path: Path) -> None:
    cards.wheels(tmp_path)
    cards.wheel(tmp_path, "numpy", {}, version="2.0")
    with pytest.raises(FlashError, match="in one version"):
        bundle.wheels(tmp_path, python="3.13")


def test_a_complete_folder_needs_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards.wheels(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a program was started"))
    assert len(bundle.fill(tmp_path, python="3.13")) == len(bundle.NEEDED)


def test_pip_s_failure_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "source_folder", lambda: None)
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    with pytest.raises(FlashError, match="No matching distribution found for fedhlm"):
        bundle.fill(tmp_path / "wheels", python="3.13")
    assert list((tmp_path / "wheels").iterdir()) == []


def test_pip_takes_the_tags_and_finds_by_them(tmp_path: Path) -> None:
    """pip itself is the oracle: of wheels for several machines it picks the one of the device."""
    store = tmp_path / "store"
    for tag in (
        "cp313-cp313-manylinux_2_28_aarch64",
        "cp313-cp313-manylinux_2_28_x86_64",
        "cp311-cp311-manylinux_2_28_aarch64",
    ):
        cards.wheel(store, "thing", {"thing.py": ""}, tag=tag)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-index",
        "--find-links",
        store,
        "-d",
        tmp_path / "got",
    ]
    subprocess.run(
        [*command, *bundle.tags("3.13"), "thing"], check=True, env={"PIP_CONFIG_FILE": "/dev/null", "PATH": ""}
    )
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["thing-1.0-cp313-cp313-manylinux_2_28_aarch64.whl"]


def test_an_interpreter_is_an_archive(tmp_path: Path) -> None:
    (tmp_path / "python.exe").touch()
    with pytest.raises(ConfigError, match=r"\.tar\.gz"):
        bundle.parts([], interpreter=tmp_path / "python.exe")


def test_the_copy_that_is_built_has_the_units_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bundle.source_folder()
    assert source is not None
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(bundle, "_pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(bundle, "_NO_SOURCE", (*bundle._NO_SOURCE, "fedhlm_zoo"))
    bundle._build(source, tmp_path / "copy", tmp_path)
    # By its whole path: pip takes a bare word for a project of the package index.
    assert calls == [("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(tmp_path / "copy"))]
    for name, content in bundle.shipped_units().items():
        assert (tmp_path / "copy/fedhlm_fleet/flash" / name).read_bytes() == content
    names = {path.name for path in (tmp_path / "copy").rglob("*")}
    assert {"pyproject.toml", "README.md", "fedhlm"} <= names
    assert not names & {".venv", ".git", "tests", "__pycache__", "build"}
