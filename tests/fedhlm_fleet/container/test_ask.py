"""The client puts an answer together however MQTT brings its pieces."""

from typing import Final

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.party import Stamp
from fedhlm.protocol.messages import Output
from fedhlm_fleet.container.ask import _whole

CLOUD: Final = "cloud"
STAMP = Stamp("porch", lambda: 1.0)


def pieces_of(sizes: list[int]) -> list[Output]:
    """An answer in pieces of these sizes, and the empty one that ends it."""
    pieces = []
    position = 0
    for size in sizes:
        ids = tuple(range(position, position + size))
        text = "".join(f"<{i}>" for i in ids)
        pieces.append(
            Output(**STAMP(), request="r", position=position, ids=ids, sources=tuple(CLOUD for _ in ids), text=text)
        )
        position += size
    return [*pieces, Output(**STAMP(), request="r", position=position, ids=(), sources=(), text="", finish="length")]


@given(sizes=st.lists(st.integers(1, 5), max_size=6), data=st.data())
def test_any_order_with_repetitions_gives_the_whole_answer_once_nothing_is_missing(
    sizes: list[int], data: st.DataObject
) -> None:
    pieces = pieces_of(sizes)
    again = data.draw(st.lists(st.sampled_from(pieces), max_size=4))
    order = data.draw(st.permutations([*pieces, *again]))
    known: dict[int, Output] = {}
    seen: set[int] = set()
    for piece in order:
        answer = _whole(known, piece)
        seen.add(piece.position)
        assert (answer is not None) == (len(seen) == len(pieces))
        if answer is not None:
            assert answer["ids"] == list(range(sum(sizes)))
            assert answer["text"] == "".join(f"<{i}>" for i in range(sum(sizes)))
            assert answer["finish"] == "length"
