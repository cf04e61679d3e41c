"""What the console shows: the same by changes as at once, each token with who decided it, and never without bound."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fedhlm.bus.party import Stamp, presence
from fedhlm.decoding.models import tokenizer_at
from fedhlm.decoding.text import TextStream
from fedhlm.learning.curve import Curve
from fedhlm.protocol.messages import Fingerprint, Learned, MetricsReport, Output, PaperThreshold, Presence, Prompt
from fedhlm_fleet.console.feeds import RecordedFeed
from fedhlm_fleet.console.history import BUCKETS_MAX, ROUNDS_MAX
from fedhlm_fleet.console.state import LOG_MAX, ConsoleState
from fedhlm_fleet.console.texts import Pieces
from fedhlm_fleet.console.texts_seen import LATER, MS, SCORE, TEXTS_MAX
from fedhlm_fleet.remedies import cut_off, no_edge, offline
from fedhlm_traces.decoded import look
from fedhlm_traces.file import read
from fedhlm_zoo.shipped import model_folder

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL, LARGE = Fingerprint("abc", 4_096, "philox-1", "small"), Fingerprint("abc", 4_096, "philox-1", "large")
HERE = {"cluster": "home", "agent": "porch"}
STAMP, EDGE = Stamp("porch"), Stamp("edge-home")


def state(*, tokenizer: bool = True) -> ConsoleState:
    found = tokenizer_at(model_folder("", "slm"))[0] if tokenizer else None
    return ConsoleState(lambda: Pieces(found), budget=0.05, confidence=0.95)


def output(position: int, *sources: str, request: str = "r", text: str = "", **options: Any) -> Output:
    ids = tuple(range(10 + position, 10 + position + len(sources)))
    return Output(**STAMP(), request=request, position=position, ids=ids, sources=sources, text=text, **options)  # type: ignore[arg-type]


def edge(*, sees: bool = True, online: bool = True) -> Presence:
    return presence(EDGE, "edge", online=online, upstream=LARGE if sees else None)


def events(shown: ConsoleState) -> list[tuple[str, str, str]]:
    return [(entry["kind"], entry["who"], entry["words"]) for entry in shown.snapshot()["log"]]


def applied(page: dict[str, Any], change: dict[str, Any]) -> None:
    """What console.js does with a change."""
    page |= {key: change[key] for key in ("parts", "missing", "cost") if key in change}
    for told in change.get("figures", ()):
        for part in page["parts"]:
            if (part["cluster"], part["name"]) == (told["cluster"], told["name"]):
                part.update(told)
    for key, name in (("clusters", "cluster"), ("routing", "at")):
        found = {row[name]: row for row in (*page[key], *change.get(key, ()))}
        page[key] = list(found.values())
    for text in change.get("texts", ()):
        before: list[Any] = next((t["tokens"] for t in page["texts"] if t["id"] == text["id"]), [])
        page["texts"] = [t for t in page["texts"] if t["id"] != text["id"]]
        page["texts"].append(text | {"tokens": before[: text["from"]] + text["tokens"], "from": 0})
    page["log"] += change.get("log", [])


@pytest.mark.parametrize("name", ["budget", "fedhlm"])
def test_a_page_that_follows_shows_what_a_page_that_opens_late_shows(name: str) -> None:
    trace = read(GOLDEN / f"{name}.trace")
    shown = state()
    page = copy.deepcopy(shown.snapshot())
    for i, record in enumerate(trace):
        seen = look(record, trace.header.root)
        if seen.message is not None:
            shown.put(seen.message, seen.levels, record.wall_ms / 1000.0)
        if i % 37 == 0:
            applied(page, json.loads(json.dumps(shown.changes())))
    applied(page, json.loads(json.dumps(shown.changes())))
    whole = json.loads(json.dumps(shown.snapshot()))
    by_id = {text["id"]: text for text in page["texts"]}
    assert [by_id[text["id"]] for text in whole["texts"]] == whole["texts"]
    assert page["log"][-len(whole["log"]) :] == whole["log"]
    assert page["clusters"] == whole["clusters"]
    known = {part["name"]: part.get("sources") for part in page["parts"]}
    assert {part["name"]: part.get("sources") for part in whole["parts"]} == known
    assert not shown.changes(), "nothing is told twice"


def test_a_change_holds_all_messages_since_the_one_before() -> None:
    shown = state(tokenizer=False)
    for position, word in enumerate(("a", "b", "c")):
        shown.put(output(position, "local", text=word), HERE, 1.0)
    [text] = shown.changes()["texts"]
    assert (text["from"], [t[0] for t in text["tokens"]]) == (0, ["a", "b", "c"])
    for position, word in ((3, "d"), (4, "e")):
        shown.put(output(position, "local", text=word), HERE, 2.0)
    [text] = shown.changes()["texts"]
    assert (text["from"], [t[0] for t in text["tokens"]]) == (3, ["d", "e"])


def test_every_token_has_its_text_its_source_its_doubt_and_its_draft() -> None:
    trace = read(GOLDEN / "budget.trace")
    shown = RecordedFeed(trace, state).snapshot()
    tokenizer = tokenizer_at(model_folder("", "slm"))[0]
    told: dict[str, list[int]] = {}
    sources: dict[str, list[str]] = {}
    for record in trace:
        seen = look(record, trace.header.root)
        if isinstance(seen.message, Output):
            key = f"{seen.agent}/{seen.message.request}"
            told.setdefault(key, []).extend(seen.message.ids)
            sources.setdefault(key, []).extend(seen.message.sources)
    for text in shown["texts"]:
        written = "".join(token[0] for token in text["tokens"])
        assert written == TextStream(tokenizer).push(told[text["id"]], last=True)
        assert [token[1] for token in text["tokens"]] == sources[text["id"]]
    tokens = [token for text in shown["texts"] for token in text["tokens"]]
    assert all(token[2] is not None for token in tokens), "the demo's agents keep journals"
    assert {token[LATER] for token in tokens if token[1] == "local"} == {None, True, False}, "some were looked at later"
    assert {token[LATER] for token in tokens if token[1] == "cloud"} == {None}, "the LLM has settled these at once"
    assert any(token[SCORE] is not None for token in tokens if token[1] == "peer")
    assert all(token[MS] >= 0 for token in tokens)
    replaced = [token for token in tokens if token[3] is not None and token[3] != token[0]]
    assert replaced
    assert {token[1] for token in replaced} == {"cloud"}, "nobody but the cloud takes another token than the draft"


def test_without_the_tokenizer_a_message_is_one_piece_and_says_so() -> None:
    shown = state(tokenizer=False)
    shown.put(output(0, "local", "cloud", text="two words"), HERE, 1.0)
    shown.put(output(2, "local", "local", text=" and two"), HERE, 1.0)
    assert [t[:2] for t in shown.snapshot()["texts"][0]["tokens"]] == [["two words", "mixed"], [" and two", "local"]]


def test_a_tokenizer_of_another_fleet_is_noticed() -> None:
    shown = state()
    shown.put(output(0, "local", "local", text="what the agent wrote"), HERE, 1.0)
    assert [t[0] for t in shown.snapshot()["texts"][0]["tokens"]] == ["what the agent wrote"]


def test_lost_and_repeated_messages_are_shown_as_such() -> None:
    shown = state(tokenizer=False)
    shown.put(Prompt(**Stamp("me")(), request="r", text="Once"), HERE, 1.0)
    first = output(0, "local", text="upon")
    for message in (first, first, output(3, "cloud", text="time", finish="length")):
        shown.put(message, HERE, 2.0)
    [text] = shown.snapshot()["texts"]
    assert (text["prompt"], text["client"], text["finish"], text["count"]) == ("Once", "me", "length", 4)
    assert [t[1] for t in text["tokens"]] == ["local", "missing", "cloud"]
    assert text["tokens"][1][2] == 2, "so many"


def test_events_tell_outages_rounds_refusals_and_no_news_of_the_past() -> None:
    shown = state()
    shown.put(edge(), {"cluster": "home"}, 1.0, retained=True)
    shown.put(presence(STAMP, "agent", online=True, fingerprint=SMALL), HERE, 1.0, retained=True)
    assert events(shown) == []
    shown.put(edge(sees=False), {"cluster": "home"}, 2.0)
    shown.put(edge(), {"cluster": "home"}, 3.0)
    shown.put(presence(STAMP, "agent", online=False), HERE, 4.0)
    for number in (1, 1, 2):
        shown.put(Learned(**Stamp("cloud")(), round=number, members=2), {}, 5.0)
    shown.put(output(0, finish="error", error="ask later", refusal="busy"), HERE, 6.0)
    assert events(shown) == [
        ("offline", "edge", "sees no cloud: new text stays unverified"),
        ("online", "edge", "sees the cloud again"),
        ("offline", "porch", "is offline"),
        ("round", "cloud", "closed round 2 of 2 members"),
        ("refused", "porch", "refused a request: ask later"),
    ]
    part = next(part for part in shown.snapshot()["parts"] if part["name"] == "porch")
    assert (part["online"], part["wrong"], part["model"]) == (False, "offline", "small"), "its model is not forgotten"


def test_a_restart_a_lost_connection_and_a_second_program_are_told_apart() -> None:
    def program(second: float) -> tuple[Presence, Presence]:
        stamp = Stamp("porch", lambda: second)
        return tuple(presence(stamp, "agent", online=online, fingerprint=SMALL) for online in (True, False))  # type: ignore[return-value]

    shown = state()
    (first, its_end), (second, _) = program(10.0), program(20.0)
    for now_s, message in enumerate((first, its_end, first, its_end, second, first, second)):
        shown.put(message, HERE, float(now_s))
    told = [(kind, words) for kind, _, words in events(shown)]
    assert told == [
        ("online", "is online"),
        ("offline", "is offline"),
        ("online", "is online again, and did not restart"),
        ("offline", "is offline"),
        ("restarted", "has restarted"),
        ("takeover", "was taken over by an earlier program of its name: two of them are running"),
    ]


def test_reported_figures_are_shown_at_their_agent() -> None:
    shown = state()
    shown.put(presence(STAMP, "agent", online=True, fingerprint=SMALL), HERE, 1.0)
    values = {"tau": 0.4, "risk_limit": 0.02, "sources": 1.0, "name": 2.0}
    shown.put(MetricsReport(**STAMP(), values=values), HERE, 2.0)
    [part] = shown.snapshot()["parts"]
    assert (part["name"], part["tau"], part["risk_limit"]) == ("porch", 0.4, 0.02)


def test_a_long_life_and_a_hostile_agent_take_no_more_room() -> None:
    shown = state(tokenizer=False)
    for i in range(3 * TEXTS_MAX):
        shown.put(output(0, "local", request=f"r{i}", text="x"), HERE, float(i))
    for i in range(2 * LOG_MAX):
        shown.put(edge(sees=i % 2 == 0), {"cluster": "home"}, float(i))
    for i in range(100):
        levels = {"cluster": "home", "agent": f"a{i}"}
        shown.put(replace(output(2**30, "local", text="x"), request="far"), levels, 1.0)
    whole = shown.snapshot()
    assert (len(whole["texts"]), len(whole["log"])) == (TEXTS_MAX, LOG_MAX)
    assert len(shown.changes()["log"]) == LOG_MAX


def test_a_recording_is_the_same_forwards_and_backwards() -> None:
    feed = RecordedFeed(read(GOLDEN / "budget.trace"), state)
    length_s = feed.length_s or 0.0
    forward = [json.dumps(feed.snapshot(share * length_s)) for share in (0.2, 0.5, 1.0)]
    assert len(set(forward)) == 3
    assert [json.dumps(feed.snapshot(share * length_s)) for share in (1.0, 0.5, 0.2)] == forward[::-1]
    opened = feed.snapshot(feed.opens_s)
    assert all(part["online"] for part in opened["parts"]), "it opens before the recorded fleet stops"
    assert opened["texts"]


def learnt(number: int, *, weight: int, tau: float | None = None) -> Learned:
    own, peers = Curve.empty(), Curve.empty()
    for _ in range(weight):
        own.add(0.95, 1.0)
        own.add(0.15, 0.0)
    for _ in range(3 * weight):
        peers.add(0.05, 1.0)
    curves = {"closed-form/gumbel/greedy/x": own.to_bytes(), "neighbour/gumbel/greedy/x": peers.to_bytes()}
    thresholds = {} if tau is None else {"3fa4b1.09c2de": PaperThreshold(tau, 10)}
    return Learned(**STAMP(), round=number, members=1, curves=curves, thresholds=thresholds)


def test_rounds_tell_the_threshold_and_the_curve_of_the_drafts_own_doubt() -> None:
    shown = state()
    shown.put(MetricsReport(**STAMP(), values={"tau": 0.25}), HERE, 1.0)
    shown.put(MetricsReport(**STAMP(), values={"tau": -1.0}), {**HERE, "agent": "shed"}, 1.0)
    shown.put(learnt(1, weight=20), {"cluster": "home"}, 2.0)
    shown.put(learnt(2, weight=20, tau=0.5), {"cluster": "home"}, 3.0)
    shown.put(learnt(2, weight=20, tau=0.625), {"cluster": "home"}, 4.0)
    (cluster,) = shown.snapshot()["clusters"]
    assert [(told["round"], told["tau"]) for told in cluster["rounds"]] == [(1, 0.125), (2, 0.625)]
    assert cluster["rounds"][0]["m"][0] < 1.0, "what peers know is another curve"
    assert cluster["rounds"][0]["m"][2] == 1.0
    for number in range(3, ROUNDS_MAX + 9):
        shown.put(learnt(number, weight=1), {"cluster": "home"}, 5.0)
    assert len(shown.snapshot()["clusters"][0]["rounds"]) == ROUNDS_MAX
    shown.put(replace(learnt(99, weight=1), curves={"closed-form/x": b"x"}), {"cluster": "home"}, 6.0)
    assert shown.snapshot()["clusters"][0]["rounds"][-1]["m"] is None


def test_routing_is_counted_in_tens_of_seconds_and_only_what_is_new_is_told() -> None:
    shown = state(tokenizer=False)
    shown.put(output(0, "local", "cloud", text="ab"), HERE, 100.0)
    assert [bucket["at"] for bucket in shown.changes()["routing"]] == [100]
    shown.put(output(2, "local", text="c"), HERE, 109.0)
    shown.put(output(3, "peer", text="d"), HERE, 110.0)
    told = shown.changes()["routing"]
    assert [(b["at"], b["local"], b["cloud"], b["peer"]) for b in told] == [(100, 2, 1, 0), (110, 0, 0, 1)]
    for i in range(4, 4 + 2 * BUCKETS_MAX):
        shown.put(output(i, "local", text="e"), HERE, 10.0 * i + 100.0)
    assert len(shown.snapshot()["routing"]) == BUCKETS_MAX


def test_the_cost_is_that_of_finished_texts_beside_whole_laws_and_bare_text() -> None:
    shown = state(tokenizer=False)
    shown.put(presence(STAMP, "agent", online=True, fingerprint=SMALL), HERE, 1.0)
    shown.put(output(0, "local", "cloud", text="Øb"), HERE, 2.0)
    assert shown.snapshot()["cost"]["tokens"] == 0
    shown.put(output(2, finish="length", statistics={"uplink_bytes": 60.0, "round_trips": 1.0}), HERE, 3.0)
    assert shown.changes()["cost"] == {"tokens": 2, "sent": 60.0, "trips": 1.0, "law": 2 * 2 * 4_096, "text": 3}
    assert "cost" not in shown.changes()


def test_what_is_wrong_comes_with_its_remedy() -> None:
    shown = state()
    shown.put(presence(STAMP, "agent", online=True, fingerprint=SMALL), HERE, 1.0)
    found = {part["name"]: part["remedy"] for part in shown.snapshot()["parts"]}
    assert found == {"porch": no_edge("home")}
    shown.put(edge(sees=False), {"cluster": "home"}, 2.0)
    shown.put(presence(STAMP, "agent", online=False), {**HERE, "agent": "shed"}, 2.0)
    found = {part["name"]: part["remedy"] for part in shown.snapshot()["parts"]}
    assert found == {"edge": cut_off("edge"), "porch": "", "shed": offline("agent")}
