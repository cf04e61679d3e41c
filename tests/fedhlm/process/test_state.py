"""A state file is the old payload or the new one, never less; what cannot be used is kept, never trusted."""

import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedhlm.errors import ConfigError
from fedhlm.process import state

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@given(payloads=st.lists(st.binary(max_size=200), min_size=1, max_size=4))
@same_folder
def test_the_last_payload_is_read_back_and_nothing_else_is_left_behind(tmp_path: Path, payloads: list[bytes]) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    for payload in payloads:
        state.save(folder, "sums", payload)
    assert state.load(folder, "sums") == payloads[-1]
    assert [p.name for p in folder.iterdir()] == ["sums"]


@given(payload=st.binary(max_size=64), data=st.data())
@same_folder
def test_a_damaged_file_is_kept_aside_and_the_start_is_fresh(
    tmp_path: Path, payload: bytes, data: st.DataObject
) -> None:
    folder = tmp_path / "damaged"
    state.save(folder, "sums", payload)
    whole = (folder / "sums").read_bytes()
    if data.draw(st.booleans(), "truncate"):
        bad = whole[: data.draw(st.integers(0, len(whole) - 1), "length")]
    else:
        at = data.draw(st.integers(0, len(whole) - 1), "at")
        bad = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255), "flip")]) + whole[at + 1 :]
    (folder / "sums").write_bytes(bad)
    before = {p.name for p in folder.iterdir()}
    assert state.load(folder, "sums") is None
    (kept,) = {p.name for p in folder.iterdir()} - before
    assert (folder / kept).read_bytes() == bad
    assert not (folder / "sums").exists()
    state.save(folder, "sums", payload)
    assert state.load(folder, "sums") == payload


def test_damage_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sums").write_bytes(b"short")
    with caplog.at_level(logging.WARNING):
        assert state.load(tmp_path, "sums") is None
    assert "sums is truncated or garbled" in caplog.text
    assert "sums.bad-1" in caplog.text


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_halfway_leaves_the_old_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    state.save(tmp_path, "sums", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full) if call == "fsync" else patched.setattr(Path, "replace", full)
        with pytest.raises(ConfigError, match="No space left"):
            state.save(tmp_path, "sums", b"new")
    assert state.load(tmp_path, "sums") == b"old"
    state.save(tmp_path, "sums", b"newer")
    assert state.load(tmp_path, "sums") == b"newer"


def test_a_folder_that_cannot_be_written_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    with pytest.raises(ConfigError) as saving:
        state.save(folder, "sums", b"", key="edge.state")
    with pytest.raises(ConfigError) as opening:
        state.store_of(str(folder), key="edge.state")
    for caught in (saving, opening):
        assert (caught.value.key, caught.value.value) == ("edge.state", str(folder))


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    assert state.load(tmp_path, "sums") is None
    assert state.store_of("", key="edge.state") is None


def test_a_store_keeps_and_rejects(tmp_path: Path) -> None:
    store = state.store_of(str(tmp_path / "s"), key="cloud.state")
    assert store is not None
    assert list((tmp_path / "s").iterdir()) == []
    store.save("a", b"1")
    assert store.load("a") == b"1"
    store.reject("a", "is of another version")
    assert store.load("a") is None
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["a.bad-1"]
