"""Runs checks one after the other; each has a deadline, no failure stops the others, and all share a time budget."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from fedhlm.errors import FedhlmError
from fedhlm_fleet.doctor.finding import Check, Finding, Level, Remark, Subject, fail, skip

BUDGET_S: Final = 20.0


def examine(
    checks: Sequence[Check],
    subject: Subject,
    *,
    budget_s: float = BUDGET_S,
    clock_s: Callable[[], float] = time.monotonic,
) -> Iterator[Finding]:
    """Yield the findings in the order of the checks, each as soon as it is known."""
    ends_s = clock_s() + budget_s
    levels: dict[str, Level] = {}
    for check in checks:
        begun_s = clock_s()
        missing = [name for name in check.needs if levels.get(name) not in ("ok", "warn")]
        if missing:
            why = "failed" if levels.get(missing[0]) == "fail" else "was not checked"
            said = skip(f"not checked, because {missing[0]!r} {why}")
        elif begun_s >= ends_s:
            said = skip(f"not checked: {budget_s:g} s are over")
        else:
            said = _within(check, subject, min(check.deadline_s, ends_s - begun_s))
        levels[check.name] = said.level
        seconds = round(clock_s() - begun_s, 3)
        yield Finding(name=check.name, level=said.level, found=said.found, advice=said.advice, seconds=seconds)


def _within(check: Check, subject: Subject, deadline_s: float) -> Remark:
    """Run a check in a thread, and abandon it if it hangs: a wait for a name server or disk cannot be interrupted."""
    answer: queue.SimpleQueue[Remark] = queue.SimpleQueue()
    _CheckThread(target=lambda: answer.put(_safely(check, subject)), name=check.name, daemon=True).start()
    try:
        return answer.get(timeout=deadline_s)
    except queue.Empty:
        found = f"no answer within {deadline_s:.1f} s"
        return fail(found, "look at the load (top) and at the kernel's messages (dmesg), and run the doctor again")


class _CheckThread(threading.Thread):
    pass


def leave(code: int) -> int:
    """Return the exit code of the process, or end it at once if an abandoned check is still at work.

    The interpreter's own end would stop that thread inside a library's C++ code (a model that is being loaded), and that
    aborts the process.
    """
    if any(isinstance(thread, _CheckThread) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _safely(check: Check, subject: Subject) -> Remark:
    try:
        return check.run(subject)
    except FedhlmError as exc:
        return fail(" ".join(str(exc).split()), "correct what it names")
    except Exception as exc:  # noqa: BLE001 - one check's failure must not hide what the others find
        return fail(
            f"the check failed: {type(exc).__name__}: {exc}", "this is a defect of the doctor: please report it"
        )
