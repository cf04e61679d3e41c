"""An answer from its pieces: whatever the order, each counts once, and what is missing is known."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedhlm.answers import Assembly, Piece, failure_of
from fedhlm.errors import AskError, DeadlinePassed, RequestCancelled, RequestNameTaken, RequestRefused
from fedhlm.protocol.fields import Source
from fedhlm.protocol.messages import SCHEMA_VERSION, Output

LOCAL: Source = "local"
CLOUD: Source = "cloud"


def output(position: int, ids: tuple[int, ...] = (), **fields: Any) -> Output:
    sources = tuple(CLOUD if i % 3 else LOCAL for i in ids)
    named = {"text": "".join(f"<{i}>" for i in ids), "sources": sources} | fields
    stamp = {"version": SCHEMA_VERSION, "sender": "porch", "sequence": position, "sent_ms": 0}
    return Output(**stamp, request="r", position=position, ids=ids, **named)  # type: ignore[arg-type]


def outputs_of(sizes: list[int]) -> list[Output]:
    """The outputs of an answer whose ids are 0, 1, 2 ..."""
    found, position = [], 0
    for size in sizes:
        found.append(output(position, tuple(range(position, position + size))))
        position += size
    return [*found, output(position, text="!", finish="length", statistics={"tau": 0.5})]


def pieces_of(assembly: Assembly) -> list[Piece]:
    found = []
    while (piece := assembly.next()) is not None:
        found.append(piece)
    return found


sizes = st.lists(st.integers(1, 4), max_size=8)


@given(sizes, st.data())
def test_shuffled_and_repeated_outputs_give_one_answer(sizes: list[int], data: st.DataObject) -> None:
    outputs = outputs_of(sizes)
    again = data.draw(st.lists(st.sampled_from(outputs), max_size=6))
    assembly = Assembly()
    pieces: list[Piece] = []
    for one in data.draw(st.permutations([*outputs, *again])):
        assembly.take(one)
        pieces += pieces_of(assembly)
    total = sum(sizes)
    assert [i for piece in pieces for i in piece.ids] == list(range(total))
    assert [piece.position for piece in pieces] == [o.position for o in outputs]
    result = assembly.result(agent="porch", cluster="home", request="r")
    assert result.ids == tuple(range(total))
    assert result.text == "".join(piece.text for piece in pieces) == "".join(f"<{i}>" for i in range(total)) + "!"
    assert result.sources == tuple(CLOUD if i % 3 else LOCAL for i in range(total))
    assert (result.finish, result.statistics, assembly.hole) == ("length", {"tau": 0.5}, None)


@given(sizes.filter(bool), st.data())
def test_a_lost_output_leaves_a_hole_where_it_was(sizes: list[int], data: st.DataObject) -> None:
    outputs = outputs_of(sizes)
    lost = data.draw(st.integers(0, len(sizes) - 1))
    assembly = Assembly()
    for one in data.draw(st.permutations([o for i, o in enumerate(outputs) if i != lost])):
        assembly.take(one)
    assert assembly.result(agent="", cluster="", request="").finish is None
    assert assembly.result(agent="", cluster="", request="").ids == tuple(range(outputs[lost].position))
    hole = assembly.hole
    assembly.take(outputs[lost])
    assert (hole, assembly.hole) == (outputs[lost].position, None)
    assert assembly.last is outputs[-1]


def test_a_malformed_output_is_none() -> None:
    assembly = Assembly()
    assert not assembly.take(output(0, (1, 2), sources=(LOCAL,)))
    assert not assembly.take(output(0))
    assert assembly.take(output(0, (1, 2)))
    assert not assembly.take(output(0, (7, 8)))
    assert [piece.ids for piece in pieces_of(assembly)] == [(1, 2)]


def test_a_refusal_ends_it_whatever_came_before() -> None:
    """Pieces of another client's request of the same name may have been heard."""
    assembly = Assembly()
    assembly.take(output(0, (1, 2)))
    assert assembly.take(output(0, finish="error", error="in use", refusal="taken"))
    assert assembly.last is not None
    assert not assembly.take(output(2, (3,)))


def test_ends_are_told_apart() -> None:
    def kind(**fields: Any) -> type[AskError] | None:
        failure = failure_of(output(0, **fields), agent="porch")
        return None if failure is None else type(failure)

    assert [kind(finish=finish) for finish in ("stop", "length", "context")] == [None, None, None]
    assert kind(finish="error", error="no such preset") is RequestRefused
    assert kind(finish="error", error="in use", refusal="taken") is RequestNameTaken
    assert kind(finish="error", error="its deadline passed", refusal="late") is DeadlinePassed
    assert kind(finish="cancelled") is RequestCancelled
    failure = failure_of(output(0, finish="error", error="no such preset"), agent="porch")
    assert failure is not None
    assert (str(failure), failure.agent, failure.request) == ("no such preset", "porch", "r")
