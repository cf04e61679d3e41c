"""A running fleet, told as it goes: the story, under it a live view on a terminal, or a line now and then elsewhere."""

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedhlm.protocol.messages import Learned
from fedhlm_fleet.colours import STYLES, WORDS
from fedhlm_fleet.demo.journey import LABEL, Journey
from fedhlm_fleet.demo.report import Generated
from fedhlm_fleet.demo.story import Narrator

_LINES_EVERY_S: Final = 5.0
_TITLE_WIDTH: Final = 30
_INDENT: Final = 10
_LINE_MAX: Final = 100  # longer lines are hard to read
_COLUMNS_WIDTH: Final = 48


def wrapped(line: str, width: int, before: str = "") -> str:
    """Wrap a line to a width, with `before` in front of it and as much room before what follows."""
    return textwrap.fill(
        line,
        max(len(before) + _TITLE_WIDTH, min(width, _LINE_MAX)),
        initial_indent=before,
        subsequent_indent=" " * len(before),
        break_on_hyphens=False,
    )


class Progress:
    """The token counts and latest text of every agent, the journey and its story; `stage` begins a part of the demo."""

    def __init__(
        self,
        agents: Sequence[str],
        journey: Journey,
        *,
        plain: bool,
        console: Console,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.journey = journey
        self._story = Narrator(journey)
        self._plain = plain
        self._console = console
        self._clock_s = clock_s
        self._stage = ""
        self._watched = False
        self._began_s = self._shown_s = clock_s()
        self._latest: dict[str, Generated | None] = dict.fromkeys(agents)
        self._tokens: dict[str, Counter[str]] = {a: Counter() for a in agents}
        self._counted: dict[int, int] = {}

    @contextmanager
    def live(self) -> Iterator[Live | None]:
        """Show the view while the block runs, and remove it afterwards; do nothing if the output is not a terminal."""
        if self._plain:
            yield None
            return
        with Live(console=self._console, refresh_per_second=8, transient=True, get_renderable=self.view) as live:
            yield live

    def stage(self, words: str, *notes: str, watched: bool = False) -> None:
        """Begin a part of the demo, with notes on it; only a `watched` one updates the journey and tells how it goes."""
        self._stage, self._watched = words, watched
        for tokens in self._tokens.values():
            tokens.clear()
        self._shown_s = self._clock_s()
        self._timed(words)
        for line in notes:
            self.note(line)

    def note(self, line: str) -> None:
        """Print an indented line about the stage."""
        self.say(line, " " * _INDENT)

    def say(self, line: str, before: str = "") -> None:
        """Print a line that stays above the live view, wrapped to the width of the output."""
        self._console.print(wrapped(line, self._console.width, before), markup=False, highlight=False, soft_wrap=True)

    def _timed(self, line: str) -> None:
        self.say(line, f"{self._elapsed()}  ".rjust(_INDENT))

    def _tell_news(self) -> None:
        for line in self._story.news():
            self._timed(line)

    def learned(self, cluster: str, state: Learned) -> None:
        """Take in a new state of a cluster or, with "", of all clusters.

        Raises:
            ProtocolError: the curve is malformed.
        """
        if self._watched:
            self.journey.learned(cluster, state)
            self._tell_news()

    def heard(self, generated: Generated) -> None:
        """Take in the new tokens of a request."""
        new = generated.sources[self._counted.get(id(generated), 0) :]
        self._tokens[generated.agent].update(new)
        if self._watched:
            self.journey.heard(new)
            self._tell_news()
        self._counted[id(generated)] = len(generated.sources)
        self._latest[generated.agent] = generated

    def finished(self, generated: Generated) -> None:
        """Take in a finished request."""
        self._counted.pop(id(generated), None)
        if generated.error:
            self.say(f"{generated.agent} failed: {generated.error}")
        if not self._watched:
            return
        self.journey.finished(generated)
        self._tell_news()
        if self._plain and self._clock_s() - self._shown_s >= _LINES_EVERY_S:
            self._shown_s = self._clock_s()
            self._timed(f"tokens {self.journey.line()}")
            self.note(self._written(generated))

    def tell(self) -> None:
        """Print the journey's present lines."""
        for line in self.journey.lines():
            self.say(line[LABEL:], " " * _INDENT + line[:LABEL])

    def _elapsed(self) -> str:
        return f"{self._clock_s() - self._began_s:5.1f} s"

    @property
    def watched(self) -> bool:
        """Whether the stage updates the journey."""
        return self._watched

    def view(self) -> Group:
        """Return the present view: the stage, a row for each agent, and the journey's lines."""
        shown = Table(box=None, padding=(0, 1), pad_edge=False, expand=True)
        shown.add_column("agent", no_wrap=True)
        used = [s for s in WORDS if any(tokens[s] for tokens in self._tokens.values())]
        for source in used:
            shown.add_column(WORDS[source], justify="right", no_wrap=True, style=STYLES[source].split()[0])
        shown.add_column("writes", no_wrap=True, overflow="crop", ratio=1)
        # The end of the text is the new part; the table would cut it off, so the text is shortened here.
        room = max(1, self._console.width - _COLUMNS_WIDTH)
        for agent, latest in self._latest.items():
            text = " ".join(latest.text.split())[-room:] if latest else ""
            shown.add_row(agent, *(str(self._tokens[agent][s]) for s in used), Text(text))
        lines = [Text(line) for line in (self.journey.lines() if self._watched else [])]
        return Group(Text(f"{self._elapsed()}  {self._stage}", style="bold"), shown, *lines)

    def _written(self, generated: Generated) -> str:
        """A text in one line, cut at its end."""
        title = textwrap.shorten(generated.prompt, _TITLE_WIDTH, placeholder=" ...", break_on_hyphens=False)
        line = f"{generated.agent} wrote: {title} | {' '.join(generated.text.split())}"
        return line[: max(_TITLE_WIDTH, min(self._console.width, _LINE_MAX) - _INDENT)].rstrip()
