"""Compiles the grammars of new sessions beside the event loop, so that a slow one holds up no other session."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from cloud_verifier.calls import BlockJob
from cloud_verifier.sessions import Key
from fedhlm.decoding.grammar import Constrain
from fedhlm.errors import GrammarError
from fedhlm.process.saver import InThread

PREPARING_MAX: Final = 64  # blocks that wait for a grammar; further ones are compiled when their turn comes


class Preparations:
    """Blocks that wait until a grammar is compiled. `submit` takes each of them afterwards.

    A block waits behind an earlier one of its own session.
    """

    def __init__(
        self, constrain: Constrain, in_thread: InThread, submit: Callable[[BlockJob], Awaitable[object]]
    ) -> None:
        self._constrain = constrain
        self._in_thread = in_thread
        self._submit = submit
        self._waiting: dict[Key, list[BlockJob]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def hold(self, job: BlockJob) -> bool:
        """Whether a block must wait; then it is submitted later, and else the caller submits it now."""
        if (others := self._waiting.get(job.key)) is not None:
            others.append(job)
            return True
        prime = job.escalation.prime
        if prime is None or prime.sampling.grammar is None or len(self._waiting) >= PREPARING_MAX:
            return False
        self._waiting[job.key] = [job]
        task = asyncio.create_task(self._prepare(job.key), name="cloud-grammar")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _prepare(self, key: Key) -> None:
        jobs = self._waiting[key]
        try:
            for job in jobs:  # it may grow meanwhile
                prime = job.escalation.prime
                if prime is not None and prime.sampling.grammar is not None:
                    with suppress(GrammarError):  # the session is refused with it
                        await self._in_thread(self._constrain, prime.sampling.grammar)
        finally:
            del self._waiting[key]
            for job in jobs:
                await self._submit(job)
