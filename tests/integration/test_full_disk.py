"""A disk that is full or dying costs what would have been kept, once said, and no answer."""

import errno
import logging
import os
import re
from pathlib import Path

import pytest

from edge_agent.core import LEARNER_FILE
from edge_broker.embedded import EmbeddedBroker
from fedhlm.errors import ConfigError
from fedhlm.process import state
from tests.integration.live import live


def broken(number: int) -> object:
    """In place of `replace_file`: a disk that refuses."""

    def refuse(*_given: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
async def test_each_request_ends_once_and_a_restarted_agent_starts(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags: dict[str, object] = {
        "preset": "budget",
        "agent.state": tmp_path,
        "generation.learning.round_tokens": 1,  # something to keep after every text
        "generation.learning.round_s": 0.001,
    }
    async with EmbeddedBroker() as broker, live(broker.url, flags=flags) as system:
        await system.ask("Oil prices rise", max_tokens=8)
        await system.stop("porch")
        kept = (tmp_path / LEARNER_FILE).read_bytes()
        monkeypatch.setattr(state, "replace_file", broken(number))
        system.start("porch")
        await system.ready("porch")
        system.heard.clear()
        with caplog.at_level(logging.WARNING):
            answers = [await system.ask("Champions win again", max_tokens=8) for _ in range(3)]
        await system.stop("porch")
        ends = [output.request for output in system.heard if output.finish is not None]
    assert [answer.finish for answer in answers] == ["length"] * 3
    assert ends == [answer.request for answer in answers], "each ends once"
    told = [record.getMessage() for record in caplog.records if "cannot write" in record.getMessage()]
    assert sum(LEARNER_FILE in line for line in told) == 1, "said once"
    assert (tmp_path / LEARNER_FILE).read_bytes() == kept


@pytest.mark.slow
async def test_what_was_learnt_is_kept_when_an_agent_is_asked_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edge_agent.service")
    flags: dict[str, object] = {"preset": "budget", "agent.state": tmp_path}  # its first round is far away
    async with EmbeddedBroker() as broker, live(broker.url, flags=flags) as system:
        await system.ask("Oil prices rise", max_tokens=8)
        assert not (tmp_path / LEARNER_FILE).exists()
        await system.stop("porch")
        assert state.load(tmp_path, LEARNER_FILE) is not None
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request ")]
    assert len(lines) == 1, "a request is one line of the log"
    line = r"request [\w-]+: length, 8 tokens \((\d+ \w+(, )?)+\), \d+ ms, [\d,]+ bytes up, [\d,]+ to the cluster"
    assert re.fullmatch(line, lines[0]), lines[0]


def test_a_folder_of_somebody_else_is_still_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "replace_file", broken(errno.EACCES))
    with pytest.raises(ConfigError, match=r"agent\.state must be a writable folder"):
        state.store_of(str(tmp_path), key="agent.state")
