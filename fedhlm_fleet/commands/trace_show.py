"""The output of `fedhlm trace show`: one group of lines for each message or story."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from fedhlm.errors import FedhlmError, TraceError
from fedhlm.protocol.messages import Fingerprint
from fedhlm_fleet.commands.common import needing
from fedhlm_traces.decoded import Seen, Vocabularies, gist, look
from fedhlm_traces.file import Header, Record, Trace
from fedhlm_traces.request import Story
from fedhlm_traces.spelling import spelling_of
from fedhlm_traces.story import Stories, belongs, stories
from fedhlm_traces.story_text import Text, lines, no_text
from fedhlm_zoo.shipped import model_folder

_KIND_WIDTH: Final = 15
_TOPIC_WIDTH: Final = 34


def messages_told(
    records: Iterable[Record], header: Header, wanted: Callable[[Seen], bool]
) -> Iterator[tuple[str, ...]]:
    """Yield a line for each wanted message: time, topic, kind, size and content."""
    vocabularies = Vocabularies(header)
    for record in records:
        seen = look(record, header.root)
        vocabularies.learn(seen)
        if wanted(seen):
            topic = record.topic.removeprefix(f"{header.root}/")
            retained = " retained" if record.retain else ""
            told = gist(seen, vocabularies.of(seen.agent))
            size = f"{len(record.payload)} B"
            yield (
                f"{record.at_s:10.3f}  {topic:<{_TOPIC_WIDTH}}  {seen.kind:<{_KIND_WIDTH}} {size:>9}{retained}  {told}",
            )


def belonging(trace: Trace, header: Header, request: str) -> Callable[[Seen], bool]:
    """Return a predicate: does a message belong to this request ("": any request)? Reads the recording once.

    Raises:
        TraceError: the recording has no such request.
    """
    if not request:
        return lambda _: True
    wanted = [story for story in stories(trace, header) if story.request == request]
    if not wanted:
        raise _no_request(request)
    return lambda seen: any(belongs(seen, story) for story in wanted)


def _no_request(request: str) -> TraceError:
    return TraceError(
        f"--request must be the name of a request of the recording, as trace show --story lists them (got {request!r})"
    )


def stories_told(
    records: Iterable[Record], header: Header, agent: str, request: str, tokenizer: Path | None
) -> Iterator[tuple[str, ...]]:
    """Yield the stories of an agent's requests, or of one request; "" stands for all.

    Raises:
        TraceError: the recording has no such request, or the tokenizer cannot be read.
    """
    builder = Stories(header)
    text = _Texts(builder.vocabularies.fingerprints, tokenizer)
    found = False

    def complete() -> Iterator[Story]:
        for record in records:
            yield from builder.add(record)
        yield from builder.end()

    for story in complete():
        if agent in ("", story.agent) and request in ("", story.request):
            found = True
            yield tuple(lines(story, text.of(story.agent)))
    if request and not found:
        raise _no_request(request)


class _Texts:
    """Texts of token ids, from the given tokenizer, or else from the shipped one for agents that use it."""

    def __init__(self, fingerprints: Mapping[str, Fingerprint], folder: Path | None) -> None:
        self._fingerprints = fingerprints
        self._given = folder is not None
        self._digest = ""
        self._text: Text = no_text
        try:
            with needing("agent"):
                self._digest, self._text = spelling_of(folder or model_folder("", "slm"))
        except FedhlmError as exc:
            if self._given:
                raise
            print(f"fedhlm: token ids only: {exc}", file=sys.stderr)

    def of(self, agent: str) -> Text:
        """Return the function that gives the texts of an agent's tokens."""
        fingerprint = self._fingerprints.get(agent)
        same = fingerprint is not None and fingerprint.tokenizer == self._digest
        return self._text if self._given or same else no_text
