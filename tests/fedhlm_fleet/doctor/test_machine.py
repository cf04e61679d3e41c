"""Checks of the machine, on this one and on folders that describe others."""

import time
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.config import load
from fedhlm_fleet.doctor import machine
from fedhlm_fleet.doctor.finding import Subject

NUMBERS = st.lists(st.integers(0, 50), min_size=1, max_size=4)


def agent() -> Subject:
    return Subject("agent", load(environ={}))


def test_this_machine_is_fit_as_the_tests_that_run_on_it_are() -> None:
    for check in (machine.system, machine.python, machine.libraries, machine.memory):
        assert check(agent()).level == "ok", check.__name__


@pytest.mark.parametrize("name", ["armv7l", "i686", "riscv64", ""])
def test_another_architecture_is_refused(name: str) -> None:
    subject = agent()
    subject.machine = name
    said = machine.system(subject)
    assert said.level == "fail"
    assert "64-bit" in said.advice


def test_a_32_bit_python_on_a_64_bit_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedhlm_fleet.doctor.machine.struct.calcsize", lambda _: 4)
    said = machine.system(agent())
    assert said.level == "fail"
    assert "32-bit Python" in said.found


@pytest.mark.parametrize(
    ("name", "text", "level", "words"),
    [
        ("aarch64", "Features\t: fp asimd asimddp\n", "ok", "asimddp"),
        ("aarch64", "Features\t: fp asimd evtstrm\n", "ok", "without int8 dot products"),
        ("x86_64", "flags\t\t: sse2 ssse3\n", "warn", "without avx2"),
        ("x86_64", "model name: something\n", "warn", "not listed"),
    ],
)
def test_the_processor_s_features_are_read(name: str, text: str, level: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    subject = agent()
    subject.machine, subject.proc = name, tmp_path
    said = machine.processor(subject)
    assert said.level == level
    assert words in said.found


@given(have=NUMBERS, limit=NUMBERS)
def test_versions_compare_as_numbers(have: list[int], limit: list[int]) -> None:
    padded = [(*numbers, 0, 0, 0, 0)[:4] for numbers in (have, limit)]
    a, b = (".".join(map(str, numbers)) for numbers in (have, limit))
    assert machine.satisfies(a, f">={b}") is (padded[0] >= padded[1])
    assert machine.satisfies(a, f"<{b}") is (padded[0] < padded[1])
    assert machine.satisfies(a, f"=={b}") is (padded[0] == padded[1])
    assert machine.satisfies(f"{a}rc1", f">={b},<={b}") is (padded[0] == padded[1])


def test_an_old_an_absent_and_another_part_s_library() -> None:
    def version(name: str) -> str:
        if name == "tokenizers":
            raise metadata.PackageNotFoundError(name)
        return {"numpy": "1.26.4"}.get(name, "99.0")

    subject = agent()
    subject.version = version
    subject.requires = lambda: [
        "numpy>=2",
        "msgspec>=0.19",
        'tokenizers>=0.21; extra == "agent"',
        'torch==2.13.0; extra == "models"',
    ]
    said = machine.libraries(subject)
    assert said.level == "fail"
    assert said.found == "numpy must be >=2 (got 1.26.4); tokenizers must be >=0.21 (got none)"
    assert "pip install --upgrade 'fedhlm[agent]'" in said.advice


def test_our_own_requirements_are_all_understood() -> None:
    for requirement in metadata.requires("fedhlm") or []:
        assert machine._REQUIREMENT.fullmatch(requirement), requirement
    matched = machine._REQUIREMENT.fullmatch('mkdocstrings[python]>=1; extra == "docs"')
    assert matched is not None
    assert matched.groups() == ("mkdocstrings", ">=1", 'extra == "docs"')


def test_a_clock_of_before_the_installation_fails() -> None:
    subject = agent()
    subject.wall_s = lambda: 0.0
    assert machine.clock(subject).level == "fail"
    assert "set-ntp" in machine.clock(subject).advice


@pytest.mark.parametrize(("kept", "level"), [(True, "ok"), (False, "warn"), (None, "warn")])
def test_a_clock_that_nobody_keeps_is_a_warning(kept: bool | None, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_synchronised", lambda: kept)
    assert machine.clock(agent()).level == level


def test_asking_the_kernel_changes_no_clock() -> None:
    before_s = time.time() - time.monotonic()
    assert machine._synchronised() in (True, False, None)
    assert abs(time.time() - time.monotonic() - before_s) < 1.0


@pytest.mark.parametrize(
    ("total", "available", "limit", "level"),
    [
        (4_000, 3_000, "max", "ok"),
        (4_000, 50, "max", "warn"),
        (64, 60, "max", "fail"),
        (4_000, 3_000, "67108864", "fail"),
    ],
)
def test_memory_counts_under_the_group_s_limit(
    total: int, available: int, limit: str, level: str, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: {total * 1024} kB\nMemAvailable: {available * 1024} kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    subject = agent()
    subject.proc = subject.cgroup = tmp_path
    assert machine.memory(subject).level == level
