"""Logs, counters, gauges and histograms of a part.

A log record is one line, of text or JSON. It names the party that wrote it and contains no known secret. Counters, gauges and histograms
have the names of the table in `fedhlm.metrics`; `fedhlm.exposition` serves them to Prometheus.
"""

import json
import logging
import math
import sys
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final, TextIO

from fedhlm.metrics import COUNTERS, GAUGES, HISTOGRAMS, LABELS

MASK: Final = "***"
WARNED_MAX: Final = 4_096
KEY_MAX: Final = 256  # most characters of a warning's key that are stored
MESSAGE_MAX: Final = 4_096  # most characters of one record; the name of a topic alone may have 65,535


class Counters:
    """Counters by the names of COUNTERS, with a label for the names in LABELS; gauges by GAUGES, histograms by HISTOGRAMS.

    A count is raised by `add`, or read from an object that counts by itself (`follow`). A gauge is `set`, or read when
    it is asked for (`measure`). Any thread may add, set, observe and read.

    `relayed` holds the snapshots of other parts by their names, which are exported beside this part's own.
    """

    def __init__(self) -> None:
        self.relayed: dict[str, dict[str, float]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._followed: list[tuple[str, object, str]] = []
        self._values: dict[str, float] = {}
        self._measured: dict[str, list[Callable[[], float]]] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1, *, label: str = "") -> None:
        """Raise a count.

        Raises:
            KeyError: `name` is not in COUNTERS.
            ValueError: the amount is negative, a label is given for a name without labels, or it is missing.
        """
        if name not in COUNTERS:
            raise KeyError(name)
        if amount < 0:
            raise ValueError(f"counter {name} must be raised by 0 or more, since counters never fall (got {amount})")
        if bool(label) != (name in LABELS):
            raise ValueError(
                f"counter {name} must be raised {'with' if name in LABELS else 'without'} a label (got {label!r})"
            )
        with self._lock:
            self._counts[name, label] += amount

    def add_all(self, **amounts: int) -> None:
        """Raise several counts without labels."""
        for name, amount in amounts.items():
            self.add(name, amount)

    def follow(self, source: object, **attributes: str) -> None:
        """Add attributes of `source` to counts from now on; `attributes` maps names of COUNTERS to attributes.

        Several sources of a count are summed. The same source counts once.

        Raises:
            KeyError: a name is not in COUNTERS, or has labels.
            AttributeError: `source` has no such attribute.
        """
        for name, attribute in attributes.items():
            if name not in COUNTERS or name in LABELS:
                raise KeyError(name)
            getattr(source, attribute)
            if not any(held is source and (known, kept) == (name, attribute) for known, held, kept in self._followed):
                self._followed.append((name, source, attribute))

    def set(self, name: str, value: float) -> None:
        """Set a gauge.

        Raises:
            KeyError: `name` is not in GAUGES.
            ValueError: the value is not finite.
        """
        if name not in GAUGES:
            raise KeyError(name)
        if not math.isfinite(value):
            raise ValueError(f"gauge {name} must be a finite number (got {value!r})")
        with self._lock:
            self._values[name] = float(value)

    def set_all(self, **values: float | None) -> None:
        """Set several gauges. None keeps the current value."""
        for name, value in values.items():
            if value is not None:
                self.set(name, value)

    def measure(self, name: str, read: Callable[[], float]) -> None:
        """Read a gauge by calling `read` from now on, in any thread. Several readers of a gauge are summed.

        Raises:
            KeyError: `name` is not in GAUGES.
        """
        if name not in GAUGES:
            raise KeyError(name)
        self._measured.setdefault(name, []).append(read)

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Add a value to a histogram, `times` times.

        Raises:
            KeyError: `name` is not in HISTOGRAMS.
            ValueError: the value is not finite, or `times` is negative.
        """
        bounds = HISTOGRAMS[name]
        if not math.isfinite(value) or times < 0:
            raise ValueError(f"histogram {name} must observe a finite number 0 or more times (got {value!r}, {times})")
        with self._lock:
            counts = self._buckets.setdefault(name, [0] * (len(bounds) + 1))
            counts[bisect_left(bounds, value)] += times
            self._sums[name] = self._sums.get(name, 0.0) + value * times

    def gauges(self) -> dict[str, float]:
        """Return the value of each gauge that was set, in a fixed order."""
        with self._lock:
            return {name: self._values[name] for name in GAUGES if name in self._values}

    def __getitem__(self, name: str) -> int:
        """Return the count of a name, summed over its labels; 0 before the first `add`."""
        if name not in COUNTERS:
            raise KeyError(name)
        return sum(count for (known, _), count in self.items() if known == name)

    def by_label(self, name: str) -> dict[str, int]:
        """Return the counts of a labelled name by label."""
        return {label: count for (known, label), count in self.items() if known == name}

    def items(self) -> list[tuple[tuple[str, str], int]]:
        """Return ((name, label), count) of all counts so far, in a fixed order."""
        with self._lock:
            counts = self._counts.copy()
        for name, source, attribute in self._followed:
            if amount := getattr(source, attribute):
                counts[name, ""] += amount
        return sorted(counts.items())

    def snapshot(self) -> dict[str, float]:
        """Return all counts, with a labelled one as `name.label`, all gauges, and histograms.

        A histogram has its counts by bucket as `name.0`, `name.1`, ... (empty ones left out; the last has no upper
        bound), and `name.sum`.
        """
        counts = {f"{name}.{label}" if label else name: count for (name, label), count in self.items()}
        measured = {name: sum(read() for read in readers) for name, readers in self._measured.items()}
        with self._lock:
            observed = {f"{name}.{i}": n for name, found in self._buckets.items() for i, n in enumerate(found) if n}
            sums = {f"{name}.sum": value for name, value in self._sums.items()}
        return {**counts, **self.gauges(), **measured, **observed, **sums}


@contextmanager
def silenced() -> Iterator[None]:
    """Write no log record below CRITICAL inside the block, in which parts run for another purpose than to serve."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


class OneLine(logging.Formatter):
    """Formats `time level party logger: message`, with line breaks escaped and secrets masked. A traceback follows."""

    def __init__(self, party: str, secrets: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(party)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        self._party = party
        self._secrets = tuple(secret for secret in secrets if secret)

    def format(self, record: logging.LogRecord) -> str:
        record.party = self._party
        return self._masked(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is the standard library's
        # Text from the bus may be part of a message. A line break in it must not look like another record, and a few
        # messages must not fill the disk.
        return _cut(super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n"))

    def _masked(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return text


class OneObject(OneLine):
    """Formats one JSON object a line: `time` in UTC, `level`, `party`, `logger`, `message`, and `traceback` after an error."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "party": self._party,
            "logger": record.name,
            "message": _cut(self._masked(record.getMessage())),
        }
        if record.exc_info:
            told["traceback"] = self._masked(self.formatException(record.exc_info))
        return json.dumps(told, ensure_ascii=False)


FORMATS: Final[dict[str, type[OneLine]]] = {"lines": OneLine, "json": OneObject}


def _cut(text: str) -> str:
    return text if len(text) <= MESSAGE_MAX else f"{text[:MESSAGE_MAX]}... ({len(text)} characters)"


def configure_logging(
    level: str, party: str, *, secrets: Iterable[str] = (), form: str = "lines", stream: TextIO | None = None
) -> logging.Handler:
    """Send all records of `level` and above to `stream` (default: stderr). Replaces other handlers; returns its own.

    `form` is a name of FORMATS.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(FORMATS[form](party, secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    return handler


_warned: Final[set[tuple[str, str]]] = set()


def warn_once(logger: logging.Logger, key: str, message: str, *args: object) -> None:
    """Log at WARNING the first time for this logger and `key`, and at DEBUG afterwards.

    Keys may contain text from strangers, so only the first WARNED_MAX are stored. New keys after that log at DEBUG.
    """
    key = key[:KEY_MAX]
    known = (logger.name, key) in _warned
    if known or len(_warned) >= WARNED_MAX:
        logger.debug(message, *args)
    else:
        _warned.add((logger.name, key))
        logger.warning(message, *args)


def forget_warnings() -> None:
    """Make every `warn_once` warn again."""
    _warned.clear()
