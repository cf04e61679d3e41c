"""Run one function over many arguments in worker processes, which end with this process."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from fedhlm.process.leash import leash

Argument = TypeVar("Argument")
Value = TypeVar("Value")


def _begin(parent: int, disabled: int) -> None:
    """Start a worker: it ends with its parent, and logs no more than its parent does."""
    leash(parent)
    logging.disable(disabled)


def across(function: Callable[[Argument], Value], arguments: Iterable[Argument], jobs: int) -> Iterator[Value]:
    """Yield `function` of each argument as results come, from `jobs` processes.

    With `jobs` 1 everything runs in this process.
    """
    if jobs == 1:
        for one in arguments:
            with uninterrupted():
                value = function(one)
            yield value
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        jobs, mp_context=spawn, initializer=_begin, initargs=(os.getpid(), logging.root.manager.disable)
    ) as pool:

        def submit(argument: Argument) -> Future[Value]:
            # The first call starts the workers, which inherit blocked signals: Ctrl-C is for this process alone.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return pool.submit(function, argument)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        todo, running = iter(arguments), set[Future[Value]]()
        try:
            while True:
                while len(running) < 2 * jobs and (argument := next(todo, None)) is not None:
                    running.add(submit(argument))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            # After an interrupt, do not wait for jobs that have not begun.
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block, which it would break; a second Ctrl-C is not delayed."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # another handler is in charge
        yield
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
