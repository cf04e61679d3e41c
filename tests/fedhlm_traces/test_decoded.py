"""Whatever the bytes of a recording are, looking at them raises nothing and prints one harmless line."""

import random

import msgspec
import pytest
from hypothesis import given, settings

from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import SCHEMA_VERSION, AnyMessage, Output
from fedhlm_traces.decoded import GIST_CHARS, GISTS, Seen, gist, look, number, wire_bytes
from fedhlm_traces.export import FORMATS
from fedhlm_traces.file import Header, Record
from fedhlm_traces.stats import statistics
from fedhlm_traces.story import stories
from fedhlm_traces.story_text import lines
from tests.fedhlm.protocol.test_messages import KINDS, instances
from tests.fedhlm_traces.told import Told, told

HEADER = Header(created_ms=0, source="simulator")


@pytest.fixture(scope="module")
def run() -> Told:
    return told("fedhlm", seed=1, journal=True, prompts=2)


def mutated(records: list[Record], rng: random.Random) -> list[Record]:
    """Records with bytes changed, cut, swapped between topics, lost and out of order."""
    made = []
    for record in records:
        payload = bytearray(record.payload)
        for _ in range(rng.choice((0, 0, 1, 3))):
            if payload:
                payload[rng.randrange(len(payload))] = rng.randrange(256)
        if rng.random() < 0.05:
            del payload[rng.randrange(len(payload) + 1) :]
        topic = rng.choice(records).topic if rng.random() < 0.05 else record.topic
        made.append(msgspec.structs.replace(record, payload=bytes(payload), topic=topic))
        if rng.random() < 0.05:
            made[rng.randrange(len(made))], made[-1] = made[-1], made[rng.randrange(len(made))]
    return [record for record in made if rng.random() > 0.05]


@pytest.mark.parametrize("seed", range(20))
def test_mutated_recordings_break_nothing(seed: int, run: Told) -> None:
    records = mutated(run.records, random.Random(seed))
    assert statistics(records, HEADER).total.messages == len(records)
    for kind in FORMATS:
        assert sum(1 for _ in FORMATS[kind](records, HEADER, "5")) == len(records) + (kind == "csv")
    spoken = [line for story in stories(records, HEADER) for line in lines(story)]
    assert spoken
    for record in records:
        seen = look(record, HEADER.root)
        text = gist(seen, 48)
        assert text.isprintable()
        assert len(text) <= GIST_CHARS
        assert wire_bytes(seen) >= len(record.payload) + len(record.topic)


def test_every_message_type_has_a_line() -> None:
    without = [kind.__name__ for kind in KINDS if kind not in GISTS]
    assert not without, f"trace show has no line for {', '.join(without)}: add one to fedhlm_traces.decoded.GISTS"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_line_of_any_message_is_one_line_with_words(kind: type[AnyMessage]) -> None:
    @settings(max_examples=20)
    @given(message=instances(kind))
    def check(message: AnyMessage) -> None:
        seen = Seen(Record(0.0, 0, "t", b""), None, {}, message, "")
        text = gist(seen, 48)
        assert text.isprintable()
        assert 0 < len(text) <= GIST_CHARS
        assert seen.kind == kind.__name__

    check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
def test_senseless_statistics_break_nothing(value: float) -> None:
    output = Output(
        version=SCHEMA_VERSION, sender="a", sequence=1, sent_ms=1, request="r", position=0, ids=(), sources=(), text="", finish="length",
        statistics={"uplink_bytes": value},
    )  # fmt: skip
    record = Record(0.0, 0, topics.OUTPUT.name(cluster="c", agent="a", client="client"), encode(output))
    assert statistics([record], HEADER).requests == 1


@pytest.mark.parametrize(
    ("value", "text"), [(0.41, ".41"), (0.4, ".4"), (1.0, "1"), (0.0, "0"), (0.004, "0"), (0.996, "1"), (-1.0, "-1")]
)
def test_numbers_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text
