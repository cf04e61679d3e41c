"""Every request gets an answer: thousands at once, and outputs that are larger than the broker accepts."""

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from fedhlm.bus.party import Party, Stamp
from fedhlm.errors import DeadlinePassed
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import Source
from fedhlm.protocol.messages import Cancel, Output, Prompt, Sampling
from fedhlm.telemetry import Counters
from fedhlm_lab.sim import toy
from tests.brokers import until
from tests.field.fleet import both_brokers, fleets

ROOT = Path(__file__).parents[2]
MANY = 3_000
TEXT = toy.ToyTokenizer().decode([5, 6])
SMALL_BYTES = 400
COUNT = 300
LONG = 120
SEED = next(s for s in range(1_000) if len(toy.large_alone([5, 6], Sampling(s, 0.8), LONG)) == LONG)
# Plain paho-mqtt with its defaults: QoS 1, and twenty messages in flight.
ASKING = """
import sys, threading, time
import msgspec, paho.mqtt.client as paho
port, count, text = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
place, ends, ready, done = "fedhlm/1/c/home/a/porch", {}, threading.Event(), threading.Event()
client = paho.Client(paho.CallbackAPIVersion.VERSION2, "many")
def heard(_client, _data, message):
    output = msgspec.msgpack.decode(message.payload)
    if output[10] is not None:
        ends[output[5]] = [output[10], output[14]]
        if len(ends) == count:
            done.set()
client.on_message = heard
client.on_connect = lambda c, *_: c.subscribe(f"{place}/to/many/output", 1)
client.on_subscribe = lambda *_: ready.set()
client.connect("127.0.0.1", port, 30)
client.loop_start()
ready.wait(10)
for n in range(count):
    prompt = [2, 3, "many", n, int(time.time() * 1000), f"r{n}", text, 1, 1, 0.8, None, [], None]
    client.publish(f"{place}/prompt", msgspec.msgpack.encode(prompt), qos=1)
done.wait(45)
client.disconnect()
sys.stdout.buffer.write(msgspec.json.encode(ends))
"""


@both_brokers
async def test_three_thousand_prompts_at_once_are_answered_or_refused(kind: str) -> None:
    async with fleets(kind, stock=True) as (fleet,):
        await fleet.whole("porch")
        words = (ASKING, fleet.url("client many").rpartition(":")[2], str(MANY), TEXT)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", *words, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        out, _ = await process.communicate()
        ends: dict[str, list[str | None]] = msgspec.json.decode(out)
        assert len(ends) == MANY
        found = Counter((finish, refusal) for finish, refusal in ends.values())
        assert set(found) == {("length", None), ("error", "busy")}
        assert found["length", None] >= 192
        assert fleet.reconnects == {}


@both_brokers
async def test_our_client_asks_no_faster_than_the_agent_takes_requests(kind: str) -> None:
    async with fleets(kind, stock=True) as (fleet,):
        client = await fleet.whole("porch")
        await client.find("porch")
        options: dict[str, Any] = {"max_tokens": 1, "seed": 1, "temperature": 0.8, "deadline_s": 4.0}
        asked = [client.write("porch", TEXT, **options) for _ in range(MANY)]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        late = [end for end in ends if isinstance(end, DeadlinePassed)]
        whole = [end for end in ends if not isinstance(end, BaseException)]
        others = Counter(repr(end) for end in ends if isinstance(end, BaseException) and end not in late)
        assert len(late) + len(whole) == MANY, others.most_common(5)
        assert whole
        assert (await client.write("porch", TEXT, max_tokens=1, seed=1)).finish == "length"
        assert fleet.counters["agent home porch "]["dropped_messages"] == 0


@both_brokers
async def test_an_output_that_does_not_fit_comes_in_parts(kind: str) -> None:
    async with fleets(kind, largest=SMALL_BYTES) as (fleet,):
        await fleet.whole("porch")
        client = await fleet.client("ann")
        porch = Party(bus=fleet.buses["agent home porch "][0], stamp=Stamp("porch"), counters=Counters())
        answer = client.ask("porch", TEXT, max_tokens=LONG, request="r")
        await client.find("porch")
        client._open["r"] = answer._state
        answer._state.cluster = "home"
        ids = tuple(range(COUNT))
        source: Source = "cloud"
        sources = (source,) * COUNT
        whole = Output(
            **porch.stamp(), request="r", position=0, ids=ids, sources=sources, text="é" * COUNT,
            finish="length", client="ann",
        )  # fmt: skip
        assert not (await porch.send(topics.OUTPUT, whole, cluster="home", agent="porch", client="ann")).too_large
        await until(lambda: answer._state.assembly.last is not None)
        result = answer.result
        assert (result.ids, result.sources, result.text, result.finish) == (ids, whole.sources, whole.text, "length")
        assert fleet.reconnects == {}


@both_brokers
async def test_what_cannot_be_served_is_answered_at_once_whatever_is_wrong_with_it(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        client = await fleet.whole("porch")
        await client.find("porch")
        assert (await client.write("porch", TEXT, max_tokens=1, seed=1, request="first")).finish == "length"
        heard: dict[str, Output] = {}

        def note(received: Any) -> None:
            if isinstance(received.message, Output):
                heard[received.message.request] = received.message

        client._hear = note
        good = Prompt(**Stamp("client")(), request="r", text=TEXT, max_tokens=2, seed=1)
        wrong: dict[str, tuple[bytes, str]] = {
            "range": (encode(msgspec.structs.replace(good, request="range", max_tokens=0)), "invalid"),
            "preset": (encode(msgspec.structs.replace(good, request="preset", preset="nope")), "invalid"),
            "long": (encode(msgspec.structs.replace(good, request="long", text=TEXT * 1_000)), "invalid"),
            "cut": (encode(msgspec.structs.replace(good, request="cut"))[:-3], "invalid"),
            "more": (encode(msgspec.structs.replace(good, request="more")) + b"\xc0", "invalid"),
            "first": (encode(msgspec.structs.replace(good, request="first")), "taken"),
            "late": (encode(msgspec.structs.replace(good, request="late", patience_ms=0)), "late"),
        }
        place = topics.PROMPT.name(cluster="home", agent="porch")
        for payload, _ in wrong.values():
            await client.party.bus.publish(place, payload)
        async with asyncio.timeout(5.0):
            await until(lambda: set(wrong) <= set(heard))
        for name, (_, refusal) in wrong.items():
            assert (heard[name].finish, heard[name].refusal, heard[name].ids) == ("error", refusal, ()), name
            assert heard[name].error, name
        kept = encode(msgspec.structs.replace(good, request="kept"))
        await client.party.bus.publish(topics.PROMPT.name(cluster="home", agent="yard"), kept, retain=True)
        await client.subscribe(topics.OUTPUT.name(cluster="home", agent="yard", client="client"))
        await fleet.agent("yard")
        now = encode(msgspec.structs.replace(good, request="now"))
        await client.find("yard")
        await client.party.bus.publish(topics.PROMPT.name(cluster="home", agent="yard"), now)
        await until(lambda: "now" in heard and heard["now"].finish is not None)
        assert "kept" not in heard


@both_brokers
async def test_a_request_is_cancelled_while_it_is_served_while_it_waits_and_before_it_comes(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        client = await fleet.whole("porch")
        await client.find("porch")
        assert (await client.write("porch", TEXT, max_tokens=1, seed=1)).finish == "length"
        heard: dict[str, list[Output]] = {"served": [], "waiting": [], "early": [], "kept": []}

        def note(received: Any) -> None:
            if isinstance(received.message, Output):
                heard[received.message.request].append(received.message)

        client._hear = note
        place: Any = {"cluster": "home", "agent": "porch", "client": "client"}

        async def cancel(name: str) -> None:
            await client.party.send(topics.CANCEL_FROM, Cancel(**client.party.stamp(), request=name), **place)

        await cancel("early")
        for name in heard:
            prompt = Prompt(
                **client.party.stamp(), request=name, text=TEXT, max_tokens=LONG, seed=SEED, temperature=0.8
            )
            await client.party.send(topics.PROMPT_FROM, prompt, **place)
        await until(lambda: bool(heard["served"]))
        for name in ("waiting", "served", "served", "unknown"):
            await cancel(name)
        async with asyncio.timeout(20.0):
            await until(lambda: all(said and said[-1].finish is not None for said in heard.values()))
        assert {name: said[-1].finish for name, said in heard.items()} == {
            "served": "cancelled",
            "waiting": "cancelled",
            "early": "cancelled",
            "kept": "length",
        }
        assert sum(len(output.ids) for output in heard["served"]) < LONG
        assert [output.ids for output in heard["waiting"] + heard["early"]] == [(), ()]
