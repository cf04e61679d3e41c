"""Text on real brokers: what is no text is refused by name, what looks special is text, and stop strings end alike."""

from typing import Any

import pytest

from fedhlm.bus.party import Stamp
from fedhlm.errors import ConfigError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Output, Prompt, Sampling
from fedhlm_lab.sim import toy
from tests.brokers import until
from tests.field.fleet import both_brokers, fleets

TEXT = toy.ToyTokenizer().decode([5, 6])
LENGTH = 30
SEED = next(s for s in range(1_000) if len(toy.large_alone([5, 6], Sampling(s, 0.8), LENGTH)) == LENGTH)


@both_brokers
async def test_stop_strings_end_a_text_alike_however_its_tokens_come(kind: str) -> None:
    whole = toy.ToyTokenizer().decode(toy.large_alone([5, 6], Sampling(SEED, 0.8), LENGTH))
    stops = {(whole[6:14], whole[9:11]): whole[:9], (whole[5:8], whole[6:8]): whole[:5], ("😀", "-"): None}
    async with fleets(kind) as (fleet,):
        client = await fleet.whole("porch")
        options: dict[str, Any] = {"max_tokens": LENGTH, "seed": SEED, "temperature": 0.8}
        for stop, right in stops.items():
            first = min((whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole)[1] if right else None
            for preset in ("exact", "llm-only"):
                answer = await client.write("porch", TEXT, stop=stop, preset=preset, **options)
                assert answer.text == (whole if first is None else whole[:first])
                assert answer.finish == ("length" if first is None else "stop")


@both_brokers
async def test_what_is_no_text_is_refused_by_name(kind: str) -> None:
    async with fleets(kind) as (fleet,):
        client = await fleet.whole("porch")
        for text in ("\ud800", "half of a pair \udfff"):
            with pytest.raises(ConfigError, match="text"):
                await client.write("porch", text)
        heard: list[Output] = []
        client._hear = lambda received: heard.append(received.message) if isinstance(received.message, Output) else None
        await client.find("porch")
        payload = encode(Prompt(**Stamp("client")(), request="half", text="??"))
        cut = payload.replace(b"??", b"\xf0\x9f")  # half an emoji
        await client.party.bus.publish(topics.PROMPT.name(cluster="home", agent="porch"), cut)
        await until(lambda: len(heard) == 1)
        assert (heard[0].request, heard[0].refusal) == ("half", "invalid")
        assert (await client.write("porch", TEXT, max_tokens=2)).finish in ("length", "stop")
