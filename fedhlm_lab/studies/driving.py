"""Run a generation's machine without bus and clock: someone drafts, someone answers, and all happens at once."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from edge_agent.events import (
    Action,
    Answered,
    Commit,
    Committed,
    Drafted,
    DraftNext,
    Escalate,
    Event,
    Finish,
    Observation,
    Observe,
)
from edge_agent.generation import GenerationMachine


class Driven(NamedTuple):
    """What a machine did: its committed tokens, what it observed, the number of blocks, and how it ended."""

    tokens: list[Committed]
    observed: list[Observation]
    blocks: int
    end: Finish


def drive(
    machine: GenerationMachine, draft: Callable[[DraftNext], Drafted], answer: Callable[[Escalate], Answered]
) -> Driven:
    """Run a machine to its end. `draft` and `answer` return at once what model and cloud say."""
    todo: deque[Action] = deque(machine.start(0.0))
    tokens: list[Committed] = []
    observed: list[Observation] = []
    end, blocks = Finish("error"), 0
    while todo:
        event: Event | None = None
        match todo.popleft():
            case DraftNext() as wanted:
                event = draft(wanted)
            case Escalate() as block:
                blocks += 1
                event = answer(block)
            case Commit(found):
                tokens += found
            case Observe(seen):
                observed += seen
            case Finish() as end:
                pass
        if event is not None:
            todo.extend(machine.handle(event, 0.0))
    return Driven(tokens, observed, blocks, end)
