"""One change of a rule, as a text that stands once in a file and what takes its place."""

from typing import NamedTuple


class Change(NamedTuple):
    """One rule changed: `before` stands once in `file`; `tests` are the files that notice."""

    rule: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
