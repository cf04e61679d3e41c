"""No two connections of ours have one client id, whatever names and roots are chosen."""

from hypothesis import example, given
from hypothesis import strategies as st

from fedhlm.bus.identity import MAX_ID_BYTES, client_id
from fedhlm.protocol.fields import NAME_PATTERN

NAMES = st.from_regex(NAME_PATTERN, fullmatch=True)
ROOTS = st.text(min_size=1, max_size=256)
# As many names as each kind has.
PARTIES = st.one_of(
    st.tuples(st.just("agent"), st.tuples(NAMES, NAMES)),
    st.tuples(st.just("prompt"), st.tuples(NAMES, NAMES, NAMES)),
    st.tuples(st.just("edge"), st.tuples(NAMES)),
    st.tuples(st.just("edge-up"), st.tuples(NAMES)),
    st.tuples(st.just("cloud"), st.tuples()),
)
CONNECTIONS = st.tuples(PARTIES, ROOTS)


@given(one=CONNECTIONS, other=CONNECTIONS)
@example(one=(("agent", ("a-b", "c")), "r"), other=(("agent", ("a", "b-c")), "r"))
@example(one=(("cloud", ()), "prod/1"), other=(("cloud", ()), "test/1"))
@example(one=(("cloud", ()), "a/b"), other=(("cloud", ()), "a:b"))
@example(one=(("edge", ("x",)), "r"), other=(("edge-up", ("x",)), "r"))
@example(one=(("agent", ("a", "b")), "x" * 128), other=(("agent", ("a", "b")), "x" * 129))
def test_different_connections_have_different_ids(
    one: tuple[tuple[str, tuple[str, ...]], str], other: tuple[tuple[str, tuple[str, ...]], str]
) -> None:
    ids = [client_id(kind, *names, root=root) for (kind, names), root in (one, other)]
    assert (ids[0] == ids[1]) == (one == other)
    assert all(0 < len(found.encode()) <= MAX_ID_BYTES for found in ids)
    assert not any(sign in found for found in ids for sign in "+#/")
