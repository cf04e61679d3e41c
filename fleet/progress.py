"""Live view of a running fleet: one line an agent on a terminal, one line a finished request elsewhere."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fleet.report import Generated

COLOURS: Final = {"cloud": "cyan", "local": "green", "peer": "yellow", "neighbour": "magenta", "unverified": "red"}
_TEXT_WIDTH: Final = 60


class Progress:
    """Counts and latest text of every agent; `status` is the headline."""

    def __init__(self, agents: Sequence[str], *, plain: bool, console: Console) -> None:
        self.status = ""
        self._plain = plain
        self._console = console
        self._latest: dict[str, Generated | None] = dict.fromkeys(agents)
        self._tokens: dict[str, Counter[str]] = {a: Counter() for a in agents}
        self._counted: dict[int, int] = {}
        self._requests: Counter[str] = Counter()
        self._live: Live | None = None

    @contextmanager
    def live(self) -> Iterator[Live | None]:
        """Show the view while the block runs; nothing moves where the output is no terminal."""
        if self._plain:
            yield None
            return
        with Live(self._view(), console=self._console, refresh_per_second=8, get_renderable=self._view) as live:
            yield live

    def heard(self, generated: Generated) -> None:
        """New tokens of a request."""
        counted = self._counted.get(id(generated), 0)
        self._tokens[generated.agent].update(generated.sources[counted:])
        self._counted[id(generated)] = len(generated.sources)
        self._latest[generated.agent] = generated

    def finished(self, generated: Generated) -> None:
        """A request got its last output."""
        self._requests[generated.agent] += 1
        self._counted.pop(id(generated), None)
        if self._plain:
            what = generated.error or " ".join(generated.text.split())
            title = " ".join(generated.prompt.split())[:_TEXT_WIDTH]
            self._console.print(f"{generated.agent} {generated.task}: {title} | {what}", markup=False, soft_wrap=True)

    def _view(self) -> Group:
        shown = Table(box=None, padding=(0, 1))
        for heading in ("agent", "requests", "tokens", "settled by", "text"):
            shown.add_column(heading, no_wrap=True)
        for agent, latest in self._latest.items():
            tokens = self._tokens[agent]
            by_source = Text(" ").join(Text(f"{s} {n}", style=COLOURS.get(s, "")) for s, n in tokens.items())
            text = " ".join(latest.text.split())[-_TEXT_WIDTH:] if latest else ""
            shown.add_row(agent, str(self._requests[agent]), str(tokens.total()), by_source, text)
        return Group(Text(self.status, style="bold"), shown)
