"""Who decided a token, in a terminal: one word, one colour and one line for each source, wherever tokens are shown."""

from collections.abc import Iterable, Mapping
from typing import Final

from rich.text import Text

# The same colours as on the console's page, as far as terminals have them, and a line where colours are missing.
STYLES: Final = {
    "local": "cyan",
    "peer": "green underline",
    "neighbour": "magenta underline",
    "cloud": "yellow",
    "unverified": "bright_red italic",
}
WORDS: Final = {
    "local": "kept",
    "peer": "peers",
    "neighbour": "neighbours",
    "cloud": "cloud",
    "unverified": "unverified",
}


def legend(counts: Mapping[str, int] | None = None) -> Text:
    """Return the words of all sources in their colours; with counts, of those that count, each with its number."""
    found = Text("tokens: ")
    for source, style in STYLES.items():
        if counts is None or counts.get(source):
            found.append(WORDS[source] if counts is None else f"{WORDS[source]} {counts[source]}", style).append("  ")
    found.rstrip()
    return found


def painted(tokens: Iterable[tuple[str, str]]) -> Text:
    """Return tokens, each with its source, in the colours of their sources; one of no single source has none."""
    found = Text()
    for word, source in tokens:
        found.append(word, STYLES.get(source, ""))
    return found
