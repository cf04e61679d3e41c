"""Checks of configuration, files, state and model, each made to fail for real."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from fedhlm.config import load
from fedhlm.errors import ConfigError
from fedhlm.protocol.roles import PartRole
from fedhlm_fleet.doctor import local
from fedhlm_fleet.doctor.finding import Remark, Subject
from fedhlm_fleet.doctor.machine import MIB
from fedhlm_zoo.shipped import model_folder


def subject(role: PartRole = "agent", *, file: Path | None = None, **flags: str) -> Subject:
    """With flags whose dots are written as `__`."""
    given = {key.replace("__", "."): value for key, value in flags.items()}
    return Subject(role, load(environ={}, file=file, flags=given))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_configuration_error_is_named() -> None:
    said = local.configuration(Subject("agent", None, problem=ConfigError("broker.protocol", "4", "auto, 5 or 3.1.1")))
    assert said.level == "fail"
    assert "broker.protocol must be auto, 5 or 3.1.1 (got '4')" in said.found


def test_one_broker_for_both_sides_of_an_edge_is_found() -> None:
    url = "mqtt://10.0.0.1"
    said = local.configuration(subject("edge", broker__url=url, edge__upstream__url=f"{url}:1883"))
    assert said.level == "fail"
    assert "one broker" in said.found
    assert local.configuration(subject("edge", edge__upstream__url=url)).level == "ok"
    assert local.configuration(subject("edge")).level == "warn"


def test_a_key_that_others_can_read_fails(tmp_path: Path) -> None:
    key = tmp_path / "me.key"
    key.write_text("secret")

    def look() -> Remark:
        return local.key_files(subject(broker__url="mqtts://edge", broker__cert=str(key), broker__key=str(key)))

    for mode, level in ((0o600, "ok"), (0o400, "ok"), (0o640, "fail"), (0o604, "fail")):
        key.chmod(mode)
        said = look()
        assert said.level == level, oct(mode)
        assert level == "ok" or f"chmod 600 {key}" in said.advice
    key.unlink()
    assert "cannot be read" in look().found


def test_a_file_with_a_password_that_others_can_read_fails(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('[broker]\nurl = "mqtt://edge"\npassword = "secret"\n')
    file.chmod(0o644)
    said = local.key_files(subject(file=file))
    assert said.level == "fail"
    assert str(file) in said.found
    file.chmod(0o600)
    assert local.key_files(subject(file=file)).level == "ok"


def test_the_state_folder_is_written_for_real(tmp_path: Path) -> None:
    assert local.state_folder(subject()).level == "warn"
    assert local.state_folder(subject(agent__state=str(tmp_path))).level == "ok"
    said = local.state_folder(subject(agent__state=str(tmp_path / "new" / "deep")))
    assert said.level == "ok"
    assert "to be made in" in said.found
    assert list(tmp_path.iterdir()) == []


def test_a_state_folder_on_a_full_or_read_only_disk_fails(tmp_path: Path) -> None:
    with files_up_to(local.WRITTEN_BYTES // 2):
        full = local.state_folder(subject(agent__state=str(tmp_path)))
    assert full.level == "fail"
    assert "cannot be written" in full.found
    assert local.state_folder(subject(agent__state="/proc/self")).level == "fail"
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a folder" in local.state_folder(subject(agent__state=str(file / "state"))).found


def test_little_space_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize // MIB
    monkeypatch.setattr(local, "DISK_WARN_MIB", free + 1_000)
    assert local.state_folder(subject(agent__state=str(tmp_path))).level == "warn"
    monkeypatch.setattr(local, "DISK_FAIL_MIB", free + 1_000)
    assert local.state_folder(subject(agent__state=str(tmp_path))).level == "fail"


def test_an_slm_without_a_projection_is_a_warning_and_an_llm_needs_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "slm"
    shutil.copytree(model_folder("", "slm"), copy)
    (copy / "projection.npz").unlink()
    about = json.loads((copy / "model.json").read_text("utf-8"))
    del about["files"]["projection.npz"]
    (copy / "model.json").write_text(json.dumps(about), "utf-8")
    said = local.model(subject(agent__model=str(copy)))
    assert (said.level, said.advice) == ("warn", f"fit one: python -m fedhlm_zoo.projection {copy}")
    assert local.model(subject("cloud")).level == "ok"
    assert not caplog.messages


def test_a_wrong_and_a_changed_model_folder_fail(tmp_path: Path) -> None:
    shipped = subject()
    assert local.model(shipped).level == "ok"
    assert shipped.model is not None
    assert "does not exist" in local.model(subject(agent__model=str(tmp_path / "none"))).found
    copy = tmp_path / "slm"
    shutil.copytree(model_folder("", "slm"), copy)
    with (copy / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    other = local.model(subject(agent__target_tokenizer=str(tmp_path / "none")))
    assert (other.level, other.found[:23]) == ("fail", "agent.target_tokenizer ")
    changed = subject(agent__model=str(copy))
    said = local.model(changed)
    assert said.level == "fail"
    assert "has changed" in said.found
    assert "agent.model" in said.advice
    assert changed.model is None


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>not found</html>"])
def test_a_damaged_gguf_file_is_to_be_downloaded_again(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(content)
    said = local.model(subject(agent__model=str(tmp_path / "small.gguf")))
    assert said.level == "fail"
    assert said.advice.startswith("download the GGUF file again, or set agent.model to another")


def test_providers_that_this_build_lacks_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    assert local.providers(subject()).level == "ok"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    said = local.providers(subject())
    assert said.level == "warn"
    assert "falls back" in said.found


def test_decode_speed_is_measured_against_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    examined = subject()
    local.model(examined)
    said = local.speed(examined)
    assert said.level == "ok", said
    rate = float(said.found.split()[0])
    monkeypatch.setitem(local.FLOORS, "agent", 1e3 * rate)
    said = local.speed(examined)
    assert said.level == "fail"
    assert "agent.threads" in said.advice


@pytest.mark.parametrize(("model", "level"), [("llm", "ok"), ("slm", "warn")])
def test_an_llm_whose_logits_depend_on_blocks_is_found(model: Literal["slm", "llm"], level: str) -> None:
    """The shipped SLM quantises its activations at run time, as no LLM should."""
    examined = subject("cloud", cloud__model=str(model_folder("", model)))
    local.model(examined)
    said = local.blocks(examined)
    assert said.level == level
    assert "0.02 allowed" in said.found
