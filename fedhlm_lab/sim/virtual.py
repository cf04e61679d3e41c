"""An asyncio event loop on virtual time: the clock jumps to the next timer when nothing else is ready.

Sleeps cost nothing, and every run of a coroutine takes the same course. There are no sockets and no threads. A run
that can never continue raises VirtualTimeError with the names of the waiting tasks.
"""

# An event loop uses the private side of asyncio's handles by design.
# ruff: noqa: SLF001

import asyncio
import contextvars
import heapq
import logging
import sys
import threading
import weakref
from asyncio import AbstractEventLoop, Future, Handle, Task, TimerHandle
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Final, NoReturn, TypeVar

_log: Final = logging.getLogger(__name__)
_T = TypeVar("_T")

MIN_CANCELLED_TIMERS: Final = 256


class VirtualTimeError(RuntimeError):
    """The program did what virtual time cannot do, or came to a standstill. It is always a bug of the caller."""


def run_virtual(coroutine: Coroutine[Any, Any, _T], *, start: float = 0.0) -> _T:
    """Run a coroutine to its end on a new virtual loop and return its result.

    The clock begins at `start` seconds.

    Raises:
        VirtualTimeError: nothing is scheduled and the coroutine is not done, or it asked for a thread or a socket.
    """
    # The abstract class lists sockets, pipes, signals and subprocesses; none of them exists here.
    loop = VirtualLoop(start=start)  # type: ignore[abstract]
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


class VirtualLoop(AbstractEventLoop):
    """The part of an event loop that needs no operating system.

    Timers of one instant run in the order of creation.
    """

    def __init__(self, *, start: float = 0.0) -> None:
        self._now = start
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, TimerHandle]] = []
        self._sequence = 0
        self._cancelled = 0
        self._thread: int | None = None
        self._stopping = False
        self._closed = False
        self._debug = False
        self._failure: BaseException | None = None
        self._generators: weakref.WeakSet[AsyncGenerator[Any, Any]] = weakref.WeakSet()

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        if self._thread is not None and self._thread != threading.get_ident():
            raise VirtualTimeError("a thread called into a loop on virtual time: threads have no place there")
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> TimerHandle:
        handle = TimerHandle(when, callback, args, self, context)
        self._sequence += 1
        heapq.heappush(self._timers, (when, self._sequence, handle))
        handle._scheduled = True  # type: ignore[attr-defined]
        return handle

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        # Cancelled timeouts would otherwise fill the heap until their time comes.
        self._cancelled += 1
        if self._cancelled > MIN_CANCELLED_TIMERS and 2 * self._cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def create_future(self) -> Future[Any]:
        return Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, _T] | Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> Task[_T]:
        return Task(coro, loop=self, name=name, context=context)

    def is_running(self) -> bool:
        return self._thread is not None

    def is_closed(self) -> bool:
        return self._closed

    def get_debug(self) -> bool:
        return self._debug

    def set_debug(self, enabled: bool) -> None:
        self._debug = enabled

    def stop(self) -> None:
        self._stopping = True

    def run_until_complete(self, future: Coroutine[Any, Any, _T] | Future[_T]) -> _T:  # type: ignore[override]
        if self._closed or self._thread is not None or asyncio._get_running_loop() is not None:
            if asyncio.iscoroutine(future):
                future.close()
            raise VirtualTimeError("virtual time cannot start inside a running event loop, nor on a closed one")
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._generators.add, finalizer=self._finalise_generator)
        asyncio._set_running_loop(self)
        self._thread = threading.get_ident()
        main: Future[_T] = self.create_task(future, name="main") if asyncio.iscoroutine(future) else future
        try:
            self._run(main)
            self._wind_up()
            return main.result()
        except BaseException:
            self._wind_up()
            if main.done() and not main.cancelled():
                main.exception()
            raise
        finally:
            self._thread = None
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _run(self, main: Future[Any]) -> None:
        ready = self._ready
        self._stopping = False
        while not main.done():
            if not ready:
                self._advance()
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle._cancelled:
                    handle._run()
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if self._stopping:
                raise VirtualTimeError("stop() was called before the main coroutine was done")

    def _advance(self) -> None:
        """Move the clock to the next timer and make every timer of that instant ready."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
            self._cancelled = max(0, self._cancelled - 1)
        if not timers:
            raise VirtualTimeError(f"deadlock at t={self._now:g} s: nothing is scheduled, waiting: {self._waiting()}")
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            handle = heapq.heappop(timers)[2]
            handle._scheduled = False  # type: ignore[attr-defined]
            self._ready.append(handle)

    def _waiting(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=Task.get_name)
        return ", ".join(f"{task.get_name()} at {_place(task)}" for task in tasks)

    def _wind_up(self) -> None:
        """Cancel the remaining tasks in the order of their names, and let them end."""
        while True:
            leftovers = sorted(asyncio.all_tasks(self), key=Task.get_name)
            if not leftovers and not self._generators:
                return
            for task in leftovers:
                task.cancel()
            closing = [generator.aclose() for generator in list(self._generators)]
            self._generators.clear()
            end = self.create_task(_gather(leftovers, closing), name="wind up")
            self._run(end)

    def _finalise_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._generators.discard(generator)
        if not self._closed:
            self.create_task(generator.aclose(), name="finalise generator")

    def close(self) -> None:
        self._closed = True
        self._ready.clear()
        self._timers.clear()

    async def shutdown_asyncgens(self) -> None:
        """Do nothing: generators are closed when the run ends."""

    async def shutdown_default_executor(self) -> None:
        """Do nothing: there is no executor."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "handle" in context and isinstance(error, BaseException):
            # A callback failed; a simulation that continued would hide it.
            self._failure = self._failure or error
        else:
            _log.error("%s", context.get("message"), exc_info=error)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> NoReturn:  # type: ignore[override]
        raise VirtualTimeError(f"{func!r} was sent to an executor: threads do not run on virtual time")

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> NoReturn:  # type: ignore[override]
        raise VirtualTimeError("a file descriptor was watched: sockets and pipes do not exist on virtual time")

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> NoReturn:  # type: ignore[override]
        raise VirtualTimeError("a file descriptor was watched: sockets and pipes do not exist on virtual time")

    async def create_connection(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VirtualTimeError("a connection was opened: sockets do not exist on virtual time")

    async def create_server(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VirtualTimeError("a server was opened: sockets do not exist on virtual time")

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise VirtualTimeError("a host name was resolved: the network does not exist on virtual time")


async def _gather(tasks: list[Task[Any]], closing: list[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*tasks, *closing, return_exceptions=True)


def _place(task: Task[Any]) -> str:
    frames = task.get_stack(limit=1)
    if not frames:
        return "an unknown place"
    frame = frames[-1]
    return f"{frame.f_code.co_qualname}:{frame.f_lineno}"
