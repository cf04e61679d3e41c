"""Oracle 1: over real MQTT, on the shipped pair, the text is the LLM's own, token for token."""

import asyncio
from collections import Counter

import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm.decoding.alone import Alone
from fedhlm.protocol.messages import Prompt, Sampling, encode
from fedhlm.protocol.topics import ESCALATE, OUTPUT, PROMPT
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder
from tests.brokers import MOSQUITTO, Mosquitto
from tests.integration.live import ids_of, live

PROMPTS = 20
TOKENS = 64
TOLERATED = 0.001  # share of tokens that float ties between batch shapes may change


@pytest.fixture(scope="module")
def llm() -> Alone:
    return Alone.load(model_folder("", "llm"), threads=1)


@pytest.fixture(params=["mosquitto", "embedded"])
def broker(request: pytest.FixtureRequest) -> Mosquitto | EmbeddedBroker:
    if request.param == "mosquitto":
        if MOSQUITTO is None:
            pytest.skip("mosquitto is not installed")
        return Mosquitto()
    return EmbeddedBroker()


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_exact_is_the_llm_alone(broker: Mosquitto | EmbeddedBroker, llm: Alone, temperature: float) -> None:
    seen: Counter[str] = Counter()
    differing = 0
    async with broker, live(broker.url) as system:
        for number, item in enumerate(load_items()[:PROMPTS]):
            outputs = await system.ask(item.title + "\n", max_tokens=TOKENS, seed=number, temperature=temperature)
            ids = ids_of(outputs)
            oracle = llm.write(llm.encode(item.title + "\n"), Sampling(number, temperature), TOKENS)
            same = next((i for i, (a, b) in enumerate(zip(ids, oracle, strict=False)) if a != b), len(ids))
            differing += len(ids) - same
            assert len(ids) == len(oracle) or same < len(ids)
            assert "".join(o.text for o in outputs) == llm.decode(ids)
            seen.update(s for o in outputs for s in o.sources)
            seen["rollbacks"] += int(outputs[-1].statistics["rollbacks"])
    total = seen["cloud"]
    assert set(seen) == {"cloud", "rollbacks"}
    assert seen["rollbacks"] > PROMPTS
    assert differing <= TOLERATED * total, f"{differing} of {total} tokens differ"


async def test_concurrent_agents_share_batches_and_keep_their_texts(llm: Alone) -> None:
    agents = ("porch", "garden", "attic")
    items = load_items()[: len(agents)]
    async with EmbeddedBroker() as broker, live(broker.url, parts=("edge", "cloud", *agents)) as system:
        answers = await asyncio.gather(
            *(
                system.ask(item.title, name=name, max_tokens=32, seed=9)
                for name, item in zip(agents, items, strict=True)
            )
        )
    for item, outputs in zip(items, answers, strict=True):
        assert ids_of(outputs) == llm.write(llm.encode(item.title), Sampling(9), 32)


async def test_presets_run_side_by_side_and_stops_and_errors_are_told() -> None:
    title = load_items()[0].title
    async with EmbeddedBroker() as broker, live(broker.url) as system:
        local = await system.ask(title, preset="slm-only", max_tokens=12, seed=1)
        assert {s for o in local for s in o.sources} == {"local"}
        assert local[-1].statistics["uplink_messages"] == 0
        hlm = await system.ask(title, preset="hlm", max_tokens=6, seed=1)
        assert hlm[-1].statistics["uplink_bytes"] > 6 * 2 * 4_096
        remote = await system.ask(title, preset="llm-only", max_tokens=12, seed=1)
        exact = await system.ask(title, preset="exact", max_tokens=12, seed=1)
        assert ids_of(remote) == ids_of(exact)
        text = "".join(o.text for o in exact)
        stopped = await system.ask(title, preset="exact", max_tokens=12, seed=1, stop=(text[5:8],))
        assert "".join(o.text for o in stopped) == text[: text.find(text[5:8])]
        assert stopped[-1].finish == "stop"
        unknown = await system.ask(title, preset="exakt")
        assert unknown[-1].finish == "error"
        assert "did you mean 'exact'" in unknown[-1].error
        too_long = await system.ask("news " * 2_000)
        assert "fewer than the model's context" in too_long[-1].error
        empty = await system.ask("", max_tokens=3, seed=2)  # a model with a begin-of-text id needs no more
        assert len(ids_of(empty)) == 3


async def test_garbage_on_every_topic_is_counted_and_survived(llm: Alone) -> None:
    title = load_items()[1].title
    async with EmbeddedBroker() as broker, live(broker.url) as system:
        names = [
            PROMPT.name(cluster="home", agent="porch"),
            ESCALATE.name(cluster="home", agent="porch"),
            "fedhlm/1/c/home/a/porch/verdict",
            "fedhlm/1/c/home/status",
            "fedhlm/1/c/home/a/porch/status",
            "fedhlm/1/cloud/verify/home",
            "fedhlm/1/cloud/verdict/home",
            "fedhlm/1/cloud/status",
        ]
        real = encode(Prompt(**system.party.stamp(), request="x", text="y"))
        garbage = [b"", b"\xc1", b"\xff" * 100, real[:-3], real + b"\0", b"\x96" * 5_000, bytes(range(256))]
        for name in names:
            for payload in garbage:
                assert await system.party.bus.publish(name, payload)
        await system.party.bus.publish(OUTPUT.name(cluster="home", agent="porch"), b"nonsense")
        outputs = await system.ask(title, max_tokens=24, seed=3)
        assert ids_of(outputs) == llm.write(llm.encode(title), Sampling(3), 24)
        assert all(not task.done() for task in system.tasks.values())
        for part in ("porch", "edge", "cloud"):
            assert system.counters[part]["refused_messages"] >= len(garbage) - 1


async def test_a_dead_cloud_leaves_unverified_text_and_a_new_one_verifies_again(llm: Alone) -> None:
    title = load_items()[2].title
    flags: dict[str, object] = {"generation.deadline_ms": 1_000, "generation.retry_ms": 200}
    async with EmbeddedBroker() as broker, live(broker.url, flags=flags) as system:
        await system.stop("cloud")
        await system.until(lambda: system.presence["edge"].upstream is None, 10.0)
        alone = await system.ask(title, max_tokens=20, seed=4)
        assert {s for o in alone for s in o.sources} == {"unverified"}
        system.start("cloud")
        await system.ready("porch")
        outputs = await system.ask(title, max_tokens=20, seed=4)
        assert {s for o in outputs for s in o.sources} == {"cloud"}
        assert ids_of(outputs) == llm.write(llm.encode(title), Sampling(4), 20)


async def test_restarts_of_edge_and_broker_change_no_token(llm: Alone) -> None:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    title = load_items()[3].title
    async with Mosquitto() as broker, live(broker.url, flags={"generation.retry_ms": 200}) as system:
        asked = asyncio.create_task(system.ask(title, max_tokens=64, seed=5))
        await system.until(lambda: bool(system.outputs), 30.0)
        await broker.stop()
        await broker.start()
        await system.stop("edge")
        system.start("edge")
        outputs = await asked
        assert {s for o in outputs for s in o.sources} == {"cloud"}
        # What the agent said before this client was back is lost to it; what it heard is where it belongs.
        text = llm.write(llm.encode(title), Sampling(5), 64)
        for output in outputs:
            assert list(output.ids) == text[output.position : output.position + len(output.ids)]
        assert outputs[-1].position + len(outputs[-1].ids) == len(text)
