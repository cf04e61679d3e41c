"""What is cut from a recording and merged again is the recording; what does not go together is refused."""

import itertools
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.errors import TraceError
from fedhlm.protocol.messages import Fingerprint
from fedhlm_traces.edit import Selection, cut, merge, merged, merged_header, save
from fedhlm_traces.file import Header, Record, read

ROOT = "fedhlm/1"
TOPICS = (
    f"{ROOT}/c/home/a/porch/to/client/output",
    f"{ROOT}/c/home/escalate/porch",
    f"{ROOT}/cloud/fl",
    "other/thing",
    "$SYS/load",
)
HEADER = Header(created_ms=1_700_000_000_000, source="mqtt://broker")


@st.composite
def recordings(draw: st.DrawFn, *, max_size: int = 30) -> list[Record]:
    """Records in order of time, no two at the same moment."""
    moments = sorted(draw(st.sets(st.integers(0, 10_000_000), max_size=max_size)))
    return [
        Record(
            moment / 1000.0,
            HEADER.created_ms + moment,
            draw(st.sampled_from(TOPICS)),
            draw(st.binary(max_size=20)),
            draw(st.integers(0, 2)),
            draw(st.booleans()),
        )
        for moment in moments
    ]


def pieces(records: list[Record], selections: list[Selection]) -> list[tuple[Header, list[Record]]]:
    return [(HEADER, list(selection.of(records, ROOT))) for selection in selections]


@given(recordings(), st.lists(st.floats(0.001, 11_000, allow_nan=False), max_size=4))
def test_cuts_in_time_merge_to_the_original(records: list[Record], places: list[float]) -> None:
    ends = [0.0, *sorted(set(places)), float("inf")]
    parts = pieces(records, [Selection(a, b) for a, b in itertools.pairwise(ends)])
    assert sum(len(part) for _, part in parts) == len(records)
    assert list(merged(parts)) == records
    assert list(merged(parts[::-1])) == records


@given(recordings())
def test_cuts_by_topic_merge_to_the_original(records: list[Record]) -> None:
    parts = pieces(records, [Selection(filters=(topic,)) for topic in TOPICS])
    assert list(merged(parts)) == records


@given(recordings(), recordings(), st.integers(-5_000, 5_000))
def test_recordings_of_different_beginnings_merge_by_wall_time(
    one: list[Record], two: list[Record], later_ms: int
) -> None:
    other = msgspec.structs.replace(HEADER, created_ms=HEADER.created_ms + later_ms)
    two = [msgspec.structs.replace(r, wall_ms=r.wall_ms + later_ms) for r in two]
    both = list(merged([(HEADER, one), (other, two)]))
    assert [r.wall_ms for r in both] == sorted(r.wall_ms for r in one + two)
    assert [r.at_s for r in both] == sorted(r.at_s for r in both)
    created_ms = merged_header([HEADER, other]).created_ms
    assert all(r.at_s * 1000.0 == pytest.approx(r.wall_ms - created_ms, abs=1e-3) for r in both)


@given(recordings(), st.floats(0, 11_000), st.floats(0.001, 11_000), st.sets(st.sampled_from(TOPICS)))
def test_a_selection_keeps_what_it_says_and_nothing_else(
    records: list[Record], from_s: float, span_s: float, wanted: set[str]
) -> None:
    kept = list(Selection(from_s, from_s + span_s, tuple(wanted)).of(records, ROOT))
    assert kept == [r for r in records if from_s <= r.at_s < from_s + span_s and (not wanted or r.topic in wanted)]


def test_filters_may_leave_the_root_out() -> None:
    records = [Record(float(i), i, topic, b"") for i, topic in enumerate(TOPICS)]
    assert list(Selection(filters=("c/#",)).of(records, ROOT)) == records[:2]
    assert list(Selection(filters=(f"{ROOT}/#",)).of(records, ROOT)) == records[:3]
    assert list(Selection(filters=("#",)).of(records, ROOT)) == records[:4], "a wildcard does not reach $SYS"
    assert list(Selection(agent="porch").of(records, ROOT)) == records[:2]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (Selection(5.0, 5.0), "--until must be later than --from 5"),
        (Selection(filters=("a/#/b",)), "--topics"),
        (Selection(filters=("",)), "--topics"),
    ],
)
def test_impossible_selections_are_named(selection: Selection, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        selection.checked()


def test_files_are_cut_and_merged_and_keep_their_header(tmp_path: Path) -> None:
    records = [Record(i / 10, HEADER.created_ms + 100 * i, TOPICS[i % 5], bytes([i])) for i in range(200)]
    header = msgspec.structs.replace(HEADER, filters=("#",), facts={"preset": "exact"})
    save(tmp_path / "all", header, records)
    assert cut(read(tmp_path / "all"), tmp_path / "a", Selection(until_s=5.0)) == 50
    assert cut(read(tmp_path / "all"), tmp_path / "b", Selection(from_s=5.0)) == 150
    count, _ = merge([tmp_path / "b", tmp_path / "a"], tmp_path / "again")
    again = read(tmp_path / "again")
    assert count == 200
    assert list(again) == records
    assert again.header == header


def test_what_two_headers_say_is_joined() -> None:
    ours, theirs = Fingerprint("t", 48, "n", "ours"), Fingerprint("t", 48, "n", "theirs")
    one = msgspec.structs.replace(HEADER, filters=("a", "b"), fingerprints={"x": ours}, facts={"seed": 1})
    two = Header(
        created_ms=5, source="simulator", filters=("b", "c"), fingerprints={"x": theirs, "y": theirs}, facts={"seed": 2}
    )
    joined = merged_header([one, two])
    assert joined.created_ms == 5
    assert joined.source == "mqtt://broker, simulator"
    assert joined.filters == ("a", "b", "c")
    assert joined.fingerprints == {"x": ours, "y": theirs}
    assert joined.facts == {"merged": [{"seed": 1}, {"seed": 2}]}


@pytest.mark.parametrize("change", [{"root": "barn/1"}, {"schema": 99}])
def test_recordings_that_do_not_go_together_are_refused(change: dict[str, object]) -> None:
    name = next(iter(change))
    with pytest.raises(TraceError, match=f"{name} must be the same in all recordings"):
        merged_header([HEADER, msgspec.structs.replace(HEADER, **change)])


def test_after_an_error_no_half_a_file_is_left(tmp_path: Path) -> None:
    def broken() -> "object":
        yield Record(0.0, 0, "a", b"")
        raise TraceError("no more")

    with pytest.raises(TraceError, match="no more"):
        save(tmp_path / "out", HEADER, broken())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(TraceError, match="exists"):
        save(tmp_path / "out", HEADER, [])
    assert (tmp_path / "out").read_text() == "mine"
