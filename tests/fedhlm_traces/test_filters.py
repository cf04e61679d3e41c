"""Filters that do not overlap, checked against the matching itself."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.interface import topic_matches
from fedhlm.errors import TraceError
from fedhlm_traces.filters import distinct

# Every topic of up to four levels of this alphabet; "z" and a fifth level stand for what no filter names.
TOPICS = ["/".join(levels) for length in range(1, 6) for levels in product(("a", "b", "$s"), repeat=length)]
TOPICS = [topic for topic in TOPICS if "/$s" not in topic] + ["z", "a/z", "z/a", "a/b/z", "$s/z", "z/z/z", "z/z/z/z/z"]
level = st.sampled_from(["a", "b", "+"])
filters = st.builds(
    lambda first, rest, tail: "/".join([*first, *rest, *tail]) or "#",
    st.lists(st.sampled_from(["a", "b", "+", "$s"]), max_size=1),
    st.lists(level, max_size=3),
    st.sampled_from([[], ["#"]]),
)


def matching(chosen: tuple[str, ...], topic: str) -> list[str]:
    return [f for f in chosen if topic_matches(f.split("/"), topic)]


@given(st.lists(filters, min_size=1, max_size=4).map(tuple))
def test_every_topic_comes_once_or_the_filters_are_refused(chosen: tuple[str, ...]) -> None:
    try:
        kept = distinct(chosen)
    except TraceError as exc:
        one, other = str(exc).split("'")[1], str(exc).split("'")[3]
        covered = [set(matching((one, other), topic)) for topic in TOPICS]
        assert {one, other} in covered, "a topic falls under both"
        assert {one} in covered, "and one of each falls under one alone"
        assert {other} in covered
        return
    assert [f for f in dict.fromkeys(chosen) if f in kept] == list(kept)
    for topic in TOPICS:
        assert len(matching(kept, topic)) == bool(matching(chosen, topic))


def test_a_malformed_filter_is_refused() -> None:
    with pytest.raises(TraceError, match="got 'a#'"):
        distinct(("a/b", "a#"))
