"""Blocks under a grammar wait until it is compiled, and nobody else does."""

import asyncio
import threading
from typing import Any
from unittest.mock import Mock

from msgspec.structs import replace

from cloud_verifier.calls import BlockJob
from cloud_verifier.preparing import Preparations
from cloud_verifier.sessions import Key
from fedhlm.decoding.grammar import Constraint
from fedhlm.errors import GrammarError
from fedhlm.protocol.messages import Escalation, Grammar, Prime, Sampling
from tests.cloud_verifier.test_sessions import escalation


def job(agent: str, source: str | None = None, epoch: int = 0) -> BlockJob:
    asked: Escalation = escalation(epoch=epoch, primed=source is not None)
    if source is not None:
        assert isinstance(asked.before, Prime)
        asked = replace(asked, before=replace(asked.before, sampling=Sampling(1, grammar=Grammar(2, source))))
    return BlockJob(Key("c", agent, 1), asked, 0.0)


async def test_a_slow_grammar_holds_up_its_own_session_only() -> None:
    release, begun, submitted = threading.Event(), asyncio.Event(), list[BlockJob]()
    loop = asyncio.get_running_loop()

    def constrain(grammar: Grammar) -> Constraint:
        if grammar.source == "slow":
            loop.call_soon_threadsafe(begun.set)
            assert release.wait(30)
        if grammar.source == "wrong":
            raise GrammarError("no")
        return Mock(spec=Constraint)

    news = asyncio.Event()

    async def submit(given: BlockJob) -> Any:
        submitted.append(given)
        news.set()

    async def until(count: int) -> None:
        while len(submitted) < count:
            news.clear()
            await news.wait()

    held = Preparations(constrain, asyncio.to_thread, submit)
    async with asyncio.timeout(30):
        slow, behind, quick, wrong = job("a", "slow"), job("a", epoch=1), job("b", "quick"), job("d", "wrong")
        assert held.hold(slow)
        await begun.wait()
        assert held.hold(behind)
        assert not held.hold(job("c"))  # a plain block needs nothing
        assert held.hold(quick)
        assert held.hold(wrong)  # the session is refused in its turn
        await until(2)
        assert sorted(j.key.agent for j in submitted) == ["b", "d"]
        release.set()
        await until(4)
        assert submitted[2:] == [slow, behind]
        assert not held.hold(job("a", epoch=2))
