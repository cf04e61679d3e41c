"""How `fedhlm ask` prints an answer as it comes: plain, or on a terminal with each token in the colour of its source."""

from collections import Counter

from rich.console import Console

from fedhlm.answers import Marks, Piece, Result
from fedhlm.settings import Config
from fedhlm_fleet.colours import legend, painted
from fedhlm_fleet.console.texts import Pieces, pieces_maker


class Plain:
    """Prints the text as it comes, with unverified text marked."""

    def __init__(self) -> None:
        self.marks = Marks()

    def put(self, piece: Piece) -> None:
        """Print a piece."""
        print(self.marks.put(piece), end="", flush=True)

    def end(self, _result: Result) -> None:
        """Print what follows the last piece."""
        print(self.marks.end())


class Coloured(Plain):
    """Prints on a terminal: each token in the colour of its source, and a legend with their numbers under the text."""

    def __init__(self, terminal: Console, pieces: Pieces) -> None:
        super().__init__()
        self._terminal, self._pieces = terminal, pieces

    def put(self, piece: Piece) -> None:
        """Print a piece."""
        mark = self.marks.put(piece).removesuffix(piece.text)
        tokens = self._pieces.by_source(piece.ids, piece.text, piece.sources)
        self._terminal.print(mark, painted(tokens), sep="", end="", soft_wrap=True, markup=False)

    def end(self, result: Result) -> None:
        """Print what follows the last piece."""
        super().end(result)
        if result.sources:
            self._terminal.print(legend(Counter(result.sources)))


def paper_of(settings: Config) -> Plain:
    """Return what prints in colours on a terminal that has them, unless NO_COLOR is set; elsewhere what marks text.

    Raises:
        ModelError: what is configured has no readable tokenizer.
    """
    terminal = Console(highlight=False)
    if not terminal.is_terminal or terminal.no_color or terminal.color_system is None:
        return Plain()
    return Coloured(terminal, pieces_maker(settings)())
