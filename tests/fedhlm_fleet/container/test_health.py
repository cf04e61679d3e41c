"""A container's health is what its part says, as long as it goes on saying it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.process.notify import Notifier
from fedhlm_fleet import cli
from fedhlm_fleet.container import healthy, part
from tests.brokers import free_port

LIMIT_S = 60.0
DOWN = "no link to the broker: trying again"


def until_said(folder: Path, words: str) -> None:
    """Wait until the check says exactly this; nothing means well."""
    end_s = time.monotonic() + LIMIT_S
    while (wrong := healthy.complaint(folder, time.monotonic())) != words:
        assert time.monotonic() < end_s, wrong
        time.sleep(0.01)


@given(age_s=st.floats(0.0, 1e6), status=st.sampled_from(("serving", "starting", "stopping", "no link to the broker")))
def test_only_a_fresh_serving_is_well(age_s: float, status: str) -> None:
    with TemporaryDirectory() as top:
        healthy.note(Path(top), status, 1_000.0)
        wrong = healthy.complaint(Path(top), 1_000.0 + age_s)
        assert (wrong == "") == (status == healthy.SERVING and age_s <= healthy.SPAN_S)
        assert not wrong or status in wrong


def test_before_the_first_word_it_is_not_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert healthy.main(tmp_path) == 1
    assert "not said anything" in capsys.readouterr().out


def test_links_become_health(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        gone = threading.Event()
        thread = threading.Thread(
            target=part.listen, args=(channel, tmp_path), kwargs={"span_s": 0.5, "hung": gone.set}, daemon=True
        )
        thread.start()
        notifier = Notifier(str(tmp_path / "notify"), 1.0)
        changed = notifier.link("the broker")
        assert not gone.wait(2.0), "a part that has not said anything may be loading"
        notifier.serving()
        until_said(tmp_path, DOWN)
        changed(True)
        until_said(tmp_path, "")
        changed(False)
        until_said(tmp_path, DOWN)
        assert gone.wait(LIMIT_S), "and one that falls silent is ended"
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_the_last_word_of_a_part_is_kept_before_its_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = healthy.note

    def slow_disk(folder: Path, status: str, now_s: float) -> None:
        time.sleep(0.02)
        kept(folder, status, now_s)

    def work(arguments: Sequence[str] | None) -> int:
        notifier = Notifier.of()
        for number in range(8):
            notifier.send(STATUS=number)
        notifier.stopping()
        return 7

    monkeypatch.setattr(part, "note", slow_disk)
    monkeypatch.setattr(cli, "main", work)
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, "")  # what `part.main` sets is forgotten after the test
    with TemporaryDirectory(prefix="part-") as top:
        assert part.main([], Path(top)) == 7
        assert healthy.complaint(Path(top), time.monotonic()) == "stopping"


def test_a_part_serves_is_well_and_ends_when_asked_to() -> None:
    # A socket's path is short.
    with TemporaryDirectory(prefix="part-") as top:
        arguments = ["edge", "--edge.embedded_port", str(free_port())]
        code = f"from pathlib import Path; from fedhlm_fleet.container.part import main; exit(main({arguments}, Path({top!r})))"
        environ = {k: v for k, v in os.environ.items() if k not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
        with subprocess.Popen([sys.executable, "-c", code], env=environ, stderr=subprocess.PIPE, text=True) as process:
            try:
                until_said(Path(top), "")
                process.send_signal(signal.SIGTERM)
                assert process.wait(LIMIT_S) == 0
            finally:
                process.kill()
        assert healthy.complaint(Path(top), time.monotonic()) == "stopping"
