"""Print stories, one line a token: "token 17 ' oil' drafted u=.41, escalated, replaced by ' crude' by cloud, 84 ms"."""

from collections.abc import Callable, Iterator
from typing import Final

from fedhlm.protocol.sources import SOURCES
from fedhlm_traces.decoded import number
from fedhlm_traces.request import Step, Story

Text = Callable[[int], str | None]
"""The text of a token id; None if the vocabulary is unknown."""

_BY: Final = {"cloud": "by cloud", "peer": "by peers", "neighbour": "by a neighbour cluster"}


def no_text(_token: int) -> str | None:
    """Show ids only."""
    return None


def lines(story: Story, text: Text = no_text) -> Iterator[str]:
    """Yield the story's title, its notes and its tokens."""
    yield title(story)
    yield from (f"  note: {note}" for note in story.notes)
    yield from (f"  {told(step, text)}" for step in story.steps)


def title(story: Story) -> str:
    """Which agent got which request, and how it ended."""
    place = f"{story.agent} in {story.cluster}" if story.cluster else story.agent
    facts = [
        f"{len(story.steps)} token{'' if len(story.steps) == 1 else 's'}",
        "" if story.session is None else f"session {story.session}",
        "" if story.tau is None else f"tau {number(story.tau)}",
        f"{story.ended_s - story.began_s:.2f} s from second {story.began_s:.3f}",
        "" if story.finish is None else f"ended: {story.finish}{f' ({story.error})' if story.error else ''}",
        "" if story.journal else "no journal",
    ]
    asked = "" if story.prompt is None else f", {story.prompt[:60]!r}"
    return f"request {story.request or '(unknown)'} to {place}: {', '.join(filter(None, facts))}{asked}"


def told(step: Step, text: Text = no_text) -> str:
    """One token's line.

    It names the device's own draft first if that is known, else the committed token.
    """
    own = step.token if step.draft is None else step.draft
    parts = [f"token {step.index} {_name(own, text)}{_drafted(step)}"]
    if step.standing is not None:
        parts.append(f"{_name(step.standing, text)} proposed by peers{_similarity(step)}")
    parts += filter(None, [_gate(step), _outcome(step, text)])
    if step.latency_s is not None:
        parts.append(f"{1000.0 * step.latency_s:.0f} ms")
    parts += filter(None, [_scored(step)])
    return ", ".join(parts)


def _name(token: int, text: Text) -> str:
    found = text(token)
    return str(token) if found is None else repr(found)


def _drafted(step: Step) -> str:
    if step.draft is None:
        return ""
    return " drafted" if step.uncertainty is None else f" drafted u={number(step.uncertainty)}"


def _similarity(step: Step) -> str:
    return "" if step.score is None else f" at similarity {number(1.0 - step.score)}"


def _gate(step: Step) -> str:
    """The gate's decision, as far as the recording shows it."""
    if step.escalate:
        # Nobody answered in time, so there is no verdict.
        return "escalated" if not SOURCES[step.source].unreachable else "doubted"
    if not step.sent or SOURCES[step.source].kept or SOURCES[step.source].unreachable:
        return ""
    return "sent up" if step.escalate is None else "sent along"


def _outcome(step: Step, text: Text) -> str:
    stood = step.token if step.draft is None else step.draft
    if SOURCES[step.source].kept:
        return "kept"
    if SOURCES[step.source].unreachable:
        return "committed unverified: no answer in time"
    by = _BY[step.source]
    if step.draft is None:
        return f"written {by}"
    if step.token == step.standing and step.latency_s is None:
        return "adopted"
    if step.token in (stood, step.standing):
        return f"accepted {by}"
    return f"replaced by {_name(step.token, text)} {by}"


def _scored(step: Step) -> str:
    """The cloud's later opinion of a token committed without its verdict."""
    if step.missed is None or step.target_prob is None:
        return ""
    verdict = "would have written another" if step.missed else "agrees"
    return f"scored later: cloud {verdict}, p={number(step.target_prob)}"
