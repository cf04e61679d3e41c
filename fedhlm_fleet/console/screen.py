"""The console's state in a terminal: one screen of parts, texts and events."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedhlm_fleet.colours import WORDS, legend, painted

TEXTS: Final = 2
EVENTS: Final = 5


def screen(state: Mapping[str, Any], *, texts: int = TEXTS, events: int = EVENTS) -> RenderableType:
    """Draw a snapshot of `ConsoleState`."""
    parts = state["parts"]
    wrong = [f"{part['cluster']} {part['name']}: {part['wrong']}".lstrip() for part in parts if part["wrong"]]
    lines: list[RenderableType] = [Text(_head(state), style="bold")]
    lines += [Text(f"! {line}", style="bright_red") for line in (*wrong, *state["missing"])]
    if parts:
        lines.append(_table(parts))
    if state["texts"]:
        lines.append(legend())
    lines += [_written(text) for text in state["texts"][-texts:]]
    for entry in state["log"][-events:]:
        at = time.strftime("%H:%M:%S", time.localtime(entry["at"]))
        lines.append(Text(f"{at}  {' '.join(filter(None, (entry['cluster'], entry['who'], entry['words'])))}", "dim"))
    return Group(*lines)


def _head(state: Mapping[str, Any]) -> str:
    parts = state["parts"]
    if not parts:
        return "no part has announced itself on this broker"
    online = sum(part["online"] for part in parts)
    told = [f"{online} of {len(parts)} parts online"]
    known = sorted((c for c in state["clusters"] if c["errors"]), key=lambda c: str(c["cluster"]))
    if known:
        limit = known[0]["errors"][0]["limit"]
        told.append(f"error at most {limit:.1%} at {state['confidence']:.0%}, budget {state['budget']:.1%}")
    return "; ".join(told)


def shown_tau(tau: float | None) -> str:
    """A threshold; "none" where every token is verified, and nothing if it was not heard."""
    return "" if tau is None else "none" if tau < 0.0 else f"{tau:.3f}"


def shown_limit(limit: float | None) -> str:
    """The limit of an error; "none" before the first certificate, and nothing if it was not heard."""
    return "" if limit is None else "none" if limit >= 1.0 else f"{limit:.1%}"


def _table(parts: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # 80 columns hold names of nine letters
    for heading in ("cluster", "part", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tau", "limit", *WORDS.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in parts:
        sources = part.get("sources", {})
        total = sum(sources.values())
        shares = [f"{sources[source] / total:.0%}" if total else "" for source in WORDS]
        tau, limit = part.get("tau"), part.get("risk_limit")
        table.add_row(
            part["cluster"],
            part["name"],
            Text("online") if part["online"] else Text("offline", "bright_red"),
            shown_tau(tau),
            shown_limit(limit),
            *shares,
        )
    return table


def _written(text: Mapping[str, Any]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{text['agent']}: ", "bold")
    line.append(painted((word.replace("\n", " "), source) for word, source, *_ in text["tokens"]))
    line.append("" if text["finish"] else " ...", "dim")
    return line
