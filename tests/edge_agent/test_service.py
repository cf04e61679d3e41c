"""The agent's service as its clients see it, in virtual time: every request gets an answer, and none is served twice."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

import fedhlm
from cloud_verifier.service import CloudService
from edge_agent.requests import CLIENT_MAX, REQUESTS_REMEMBERED, Requests, RoutedPrompt
from edge_agent.service import ModelFacts
from fedhlm.bus.party import Party, Received, Stamp, presence
from fedhlm.config import load
from fedhlm.errors import RequestRefused
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Cancel, Output, Prompt, Sampling
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.loopback import LoopbackBus
from fedhlm_lab.sim.parts import Part
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet

PLACE = {"cluster": "c0", "agent": "a"}
TEXT = toy.ToyTokenizer().decode([5, 6])


class World:
    """A calm fleet with one agent, which is slow enough to be interrupted."""

    def __init__(
        self, preset: str, tokenizer: toy.ToyTokenizer, telemetry: dict[str, str] | None = None, **flags: str
    ) -> None:
        self.preset, self.tokenizer = preset, tokenizer
        self.flags = {"generation.temperature": "0.8"} | {f"generation.{key}": value for key, value in flags.items()}
        self.flags |= telemetry or {}
        self.fleet = Fleet(toy.pair(0.8), seed=1, clusters=1, delay_s=0.02, sessions_max=3)
        self.heard: list[Received] = []

    async def serve(self) -> None:
        loaded = load(preset=self.preset, environ={}, flags=self.flags)
        numbers = iter(range(1, 10_000))
        drafter = toy.ToyDrafter(agreement=0.8)
        facts = ModelFacts(self.tokenizer, None, frozenset({toy.EOS_ID}), toy.CONTEXT)
        _, self.service = self.fleet.agent_service(Part("a"), loaded, "c0", drafter, facts, lambda: next(numbers))
        await self.service.subscribe()
        async with self.service.connection:
            await self.service.run()

    @asynccontextmanager
    async def client(self, name: str = "client") -> AsyncIterator[fedhlm.Client]:
        bus = self.fleet.bus(name)
        async with fedhlm.Client(bus, name=name, hear=self.heard.append) as client:
            yield client

    def outputs(self, request: str) -> list[Output]:
        messages = [received.message for received in self.heard]
        return [m for m in messages if isinstance(m, Output) and m.request == request]


def played(
    scene: Callable[[World], Coroutine[Any, Any, None]],
    *,
    preset: str = "exact",
    tokenizer: toy.ToyTokenizer | None = None,
    telemetry: dict[str, str] | None = None,
    **flags: str,
) -> None:
    async def main() -> None:
        world = World(preset, tokenizer or toy.ToyTokenizer(), telemetry, **flags)
        for node in world.fleet.nodes.values():
            node.start()
        serving = asyncio.create_task(world.serve(), name="agent")
        await asyncio.sleep(1.0)
        await scene(world)
        assert not serving.done()
        serving.cancel()
        await asyncio.wait([serving])

    run_virtual(main())


def seed_of(length: int) -> int:
    """A seed whose text does not end by itself before `length` tokens."""
    return next(s for s in range(100) if len(toy.large_alone([5, 6], Sampling(s, 0.8), length)) == length)


SEED = seed_of(60)


def test_an_agent_reports_what_it_did_to_its_edge() -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            began = asyncio.get_running_loop().time()
            written = await client.write("a", TEXT, max_tokens=60, seed=SEED)
            took_s = asyncio.get_running_loop().time() - began
            with pytest.raises(RequestRefused):
                await client.write("a", TEXT, preset="no-such")
            await asyncio.sleep(3.0)
        told = world.fleet.counters.relayed["a"]
        assert told["tokens_by_source.cloud"] == len(written.ids) == 60
        assert told["refused_requests.invalid"] == 1
        first, between = (
            sum(n for key, n in told.items() if key.startswith(f"{name}.") and not key.endswith(".sum"))
            for name in ("time_to_first_token_seconds", "inter_token_latency_seconds")
        )
        assert first == 1
        assert 0 < between < 60, "tokens that came with the first have no time of their own"
        whole_s = told["time_to_first_token_seconds.sum"] + told["inter_token_latency_seconds.sum"]
        assert whole_s == pytest.approx(took_s, rel=0.1)
        positions = {key: n for key, n in told.items() if key.startswith("spec_decode_num_accepted_tokens_per_pos.")}
        assert sum(positions.values()) == told["spec_decode_num_accepted_tokens"] > 0
        assert list(positions.values()) == sorted(positions.values(), reverse=True)
        assert told["spec_decode_num_accepted_tokens"] <= told["spec_decode_num_draft_tokens"]
        assert told["num_requests_running"] == told["num_requests_waiting"] == 0

    played(scene, telemetry={"telemetry.report_s": "1.0"})


def test_an_agent_that_is_not_told_to_reports_nothing_and_one_that_left_is_forgotten() -> None:
    async def silent(world: World) -> None:
        await asyncio.sleep(60.0)
        assert not world.fleet.counters.relayed

    async def left(world: World) -> None:
        await asyncio.sleep(3.0)
        assert "a" in world.fleet.counters.relayed
        party = world.service.agent.party
        gone = presence(party.stamp, "agent", online=False)
        await party.send(topics.AGENT_STATUS, gone, cluster="c0", agent="a")
        await asyncio.sleep(0.5)
        assert not world.fleet.counters.relayed

    played(silent)
    played(left, telemetry={"telemetry.report_s": "1.0"})


def test_a_cancelled_request_ends_and_the_next_one_is_served() -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            answer = client.ask("a", TEXT, max_tokens=60, seed=SEED)
            await anext(answer)
            await answer.aclose()
            await asyncio.sleep(1.0)
            last = world.outputs(answer.request)[-1]
            assert (last.finish, last.error) == ("cancelled", "cancelled by its client")
            assert 0 < last.position < 60
            assert last.statistics["tokens_cloud"] == last.position
            assert len((await client.write("a", TEXT, max_tokens=5, seed=SEED)).ids) == 5

    played(scene)


def test_a_request_that_waits_for_the_cloud_is_cancelled_at_once() -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            await client.find("a")
            await world.fleet.nodes["cloud"].crash()
            answer = client.ask("a", TEXT, max_tokens=60, seed=SEED)
            await answer.begin()
            await asyncio.sleep(0.5)
            assert world.outputs(answer.request) == []
            await answer.aclose()
            await asyncio.sleep(0.2)
            (only,) = world.outputs(answer.request)
            assert (only.finish, only.position) == ("cancelled", 0)

    played(scene, wait_offline="true")


def test_a_request_that_waits_is_cancelled_at_once() -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            first = asyncio.create_task(client.write("a", TEXT, max_tokens=60, seed=SEED))
            await asyncio.sleep(0.1)
            second = client.ask("a", TEXT, max_tokens=60)
            await second.begin()
            await asyncio.sleep(0.1)
            await second.aclose()
            await asyncio.sleep(0.2)
            (only,) = world.outputs(second.request)
            assert (only.finish, only.position, only.statistics) == ("cancelled", 0, {})
            assert not first.done()
            assert len((await first).ids) == 60
            assert len(world.service.requests.open) == 0

    played(scene)


def test_only_its_own_client_cancels_a_request() -> None:
    async def scene(world: World) -> None:
        async with world.client() as client, world.client("stranger") as stranger:
            asked = asyncio.create_task(client.write("a", TEXT, max_tokens=60, seed=SEED, request="r"))
            await asyncio.sleep(0.2)
            await stranger.party.send(
                topics.CANCEL, Cancel(**stranger.party.stamp(), request="r"), cluster="c0", agent="a"
            )
            assert len((await asked).ids) == 60

    played(scene)


def test_a_deadline_ends_the_text_and_is_kept_in_the_queue() -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            late = client.party.stamp
            slow = Prompt(**late(), request="slow", text=TEXT, max_tokens=60, seed=SEED, patience_ms=700)
            queued = Prompt(**late(), request="queued", text=TEXT, max_tokens=60, seed=SEED, patience_ms=200)
            await client.find("a")
            for prompt in (slow, queued):
                await client.party.send(topics.PROMPT, prompt, cluster="c0", agent="a")
            await asyncio.sleep(10.0)
            ended = world.outputs("slow")[-1]
            assert (ended.finish, ended.error) == ("cancelled", "its deadline passed before the text was whole")
            assert 0 < ended.position < 60
            (never,) = world.outputs("queued")
            assert (never.finish, never.refusal) == ("error", "late")

    played(scene)


BAD: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 100.0},
    "temperature nan": {"temperature": float("nan")},
    "temperature text": {"temperature": "warm"},
    "top_p": {"top_p": 0.0},
    "top_k": {"top_k": -1},
    "min_p": {"min_p": 1.5},
    "seed": {"seed": -1},
    "seed 2**64-1": {"seed": 2**64 - 1},
    "max_tokens": {"max_tokens": 0},
    "max_tokens 65537": {"max_tokens": 65_537},
    "stop": {"stop": ["x"] * 17},
    "preset": {"preset": "../x"},
    "text": {"text": 7},
    "text bytes": {"text": b"\xff\xfe"},
    "version": {"version": 99},
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_decoded_is_answered_where_its_request_can_be_read(bad: str) -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            await client.find("a")
            prompt = Prompt(**client.party.stamp(), request="r", text=TEXT, max_tokens=3)
            fields = [2, *(getattr(prompt, name) for name in prompt.__struct_fields__)]
            for name, value in BAD[bad].items():
                fields[1 + prompt.__struct_fields__.index(name)] = value
            await client.party.bus.publish(topics.PROMPT.name(**PLACE), msgspec.msgpack.encode(fields))
            await asyncio.sleep(1.0)
            (only,) = world.outputs("r")
            assert (only.finish, only.refusal, only.client) == ("error", "invalid", "client")
            assert bad.split(maxsplit=1)[0] in only.error
            assert len((await client.write("a", TEXT, max_tokens=3, seed=SEED)).ids) == 3

    played(scene)


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"preset": "nope"}, "preset must be one of"), ({"text": "ab" * 2_000}, "shorter than the model's context")],
)
def test_what_the_agent_cannot_serve_is_refused_as_invalid(bad: dict[str, Any], said: str) -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            await client.find("a")
            prompt = Prompt(**(client.party.stamp() | {"request": "r", "text": TEXT, "max_tokens": 3} | bad))
            await client.party.send(topics.PROMPT, prompt, cluster="c0", agent="a")
            await asyncio.sleep(5.0)
            (only,) = world.outputs("r")
            assert (only.finish, only.refusal) == ("error", "invalid")
            assert said in only.error

    played(scene)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x90", b"\x91\x02", encode(Cancel(**Stamp("client")(), request="r"))],
    ids=["nothing", "no msgpack", "no fields", "a tag alone", "another message"],
)
def test_what_names_no_request_is_counted_and_passed_over(payload: bytes) -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            await client.find("a")
            before = world.fleet.counters["refused_messages"]
            await client.party.bus.publish(topics.PROMPT.name(**PLACE), payload)
            await asyncio.sleep(1.0)
            assert world.fleet.counters["refused_messages"] == before + 1
            assert not world.outputs("r")

    played(scene)


def test_a_name_that_is_taken_is_refused_and_a_duplicate_is_not_served_again() -> None:
    async def scene(world: World) -> None:
        async with world.client("alice") as alice, world.client("bob") as bob:
            first = await alice.write("a", TEXT, max_tokens=4, seed=SEED, request="r")
            with pytest.raises(fedhlm.RequestNameTaken, match="request name r is in use"):
                await bob.write("a", TEXT, max_tokens=4, request="r")
            with pytest.raises(fedhlm.RequestNameTaken):  # nor by the same client once more
                await alice.write("a", TEXT, max_tokens=4, request="r")
            assert len(first.ids) == 4
            prompt = encode(Prompt(**bob.party.stamp(), request="twice", text=TEXT, max_tokens=4, seed=SEED))
            for _ in range(2):
                await bob.party.bus.publish(topics.PROMPT.name(**PLACE), prompt)
            await asyncio.sleep(5.0)
            assert len({o.sequence for o in world.outputs("twice") if o.finish is not None}) == 1
            assert world.fleet.counters["duplicate_messages"] == 1

    played(scene)


def test_a_retained_prompt_is_not_a_request() -> None:
    async def scene(world: World) -> None:
        party: Party
        async with world.client() as client:
            await client.find("a")
            party = client.party
            prompt = encode(Prompt(**party.stamp(), request="yesterday", text=TEXT, max_tokens=4))
            await world.service.agent.party.bus.subscribe()  # as it is after a restart: the broker says what it kept
            broker = world.fleet.broker
            await party.bus.publish(topics.PROMPT.name(cluster="c0", agent="away"), prompt, retain=True)
            await asyncio.sleep(1.0)
            kept = broker.retained[topics.PROMPT.name(cluster="c0", agent="away")]
            broker.retained[topics.PROMPT.name(**PLACE)] = kept._replace(topic=topics.PROMPT.name(**PLACE))
            await world.service.agent.party.bus.subscribe(topics.PROMPT.name(**PLACE))
            await asyncio.sleep(5.0)
            assert world.outputs("yesterday") == []
            assert world.fleet.counters["refused_messages"] == 1

    played(scene)


def test_who_comes_when_the_queue_is_full_is_told() -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            await client.find("a")
            await asyncio.sleep(0.1)
            for n in range(CLIENT_MAX + 1):
                prompt = Prompt(**client.party.stamp(), request=f"r{n}", text=TEXT, max_tokens=1, seed=SEED)
                await client.party.send(topics.PROMPT, prompt, cluster="c0", agent="a")
            await client.subscribe(topics.OUTPUT.name(**PLACE, client="client"))
            await asyncio.sleep(60.0)
            ends = [world.outputs(f"r{n}")[-1] for n in range(CLIENT_MAX + 1)]
            assert [o.refusal for o in ends[-1:]] == ["busy"]
            assert {o.finish for o in ends[:-1]} == {"length"}

    played(scene)


class WordyTokenizer(toy.ToyTokenizer):
    """Each token is 300 characters."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(300 * letter for letter in super().decode(ids, skip_special_tokens))


def test_a_token_that_does_not_fit_the_broker_ends_the_text_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            await client.find("a")
            monkeypatch.setattr(LoopbackBus, "max_packet_bytes", 300)
            answer = client.ask("a", TEXT, max_tokens=60, seed=SEED)
            with pytest.raises(RequestRefused, match="larger than the broker accepts .300 bytes"):
                await answer.whole()
            assert answer.result.ids == ()
            monkeypatch.undo()
            assert len((await client.write("a", TEXT, max_tokens=5, seed=SEED)).ids) == 5

    played(scene, tokenizer=WordyTokenizer())


def test_figures_that_do_not_fit_the_broker_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            await client.find("a")
            monkeypatch.setattr(LoopbackBus, "max_packet_bytes", 250)
            answer = await client.write("a", TEXT, max_tokens=8, seed=SEED)
            assert (answer.finish, len(answer.ids), answer.statistics) == ("length", 8, {})
            assert world.fleet.counters["too_large_messages"] == 1

    played(scene)


def test_ids_and_statistics_end_with_the_token_that_completes_the_stop() -> None:
    """However many tokens a verdict brings at once."""

    async def scene(world: World) -> None:
        async with world.client() as client:
            alone = toy.large_alone([5, 6], Sampling(SEED, 0.8), 30)
            text = toy.ToyTokenizer().decode(alone)
            stop = text[11:13]
            end = text.index(stop) + len(stop)
            for preset in ("exact", "llm-only"):
                result = await client.write("a", TEXT, max_tokens=30, seed=SEED, stop=(stop,), preset=preset)
                assert (result.finish, result.text) == ("stop", text[: text.index(stop)])
                assert list(result.ids) == alone[:end]
                assert result.statistics["tokens_cloud"] == end

    played(scene)


def test_a_device_that_keeps_its_texts_sends_nothing_up_whatever_a_client_asks() -> None:
    async def scene(world: World) -> None:
        async with world.client() as client:
            with pytest.raises(RequestRefused, match="one that this agent allows: slm-only .got 'exact'"):
                await client.write("a", TEXT, max_tokens=8, seed=SEED, preset="exact")
            result = await client.write("a", TEXT, max_tokens=8, seed=SEED, preset="slm-only")
            assert (set(result.sources), result.statistics["uplink_messages"]) == ({"local"}, 0)

    played(scene, preset="slm-only")


def prompt_of(request: str, sender: str, sequence: int = 1, connection: str | None = None) -> Prompt:
    stamp = {"version": 3, "sender": sender, "sequence": sequence, "sent_ms": 0}
    return Prompt(**stamp, request=request, text="x", connection=connection)  # type: ignore[arg-type]


def cancel_of(request: str, sender: str) -> Cancel:
    return Cancel(version=3, sender=sender, sequence=9, sent_ms=0, request=request)


def test_a_cancellation_may_overtake_its_prompt_and_no_other() -> None:
    requests = Requests("a")
    assert requests.cancel(cancel_of("r", "alice")) is None
    assert requests.admit(RoutedPrompt("c0", prompt_of("r", "bob"))) is None
    end = requests.admit(RoutedPrompt("c0", prompt_of("s", "alice")))
    assert end is None
    assert requests.cancel(cancel_of("t", "alice")) is None
    end = requests.admit(RoutedPrompt("c0", prompt_of("t", "alice")))
    assert end is not None
    assert end.finish == "cancelled"


@pytest.mark.parametrize(
    ("connection", "online", "retained", "ended"),
    [
        (None, False, False, ["a"]),
        ("one", False, False, ["b", "d"]),
        ("one", True, False, []),
        ("two", False, True, ["c"]),
        (None, False, True, []),  # it may have been another life of this client
    ],
)
def test_a_clients_end_ends_the_requests_of_its_connection(
    connection: str | None, online: bool, retained: bool, ended: list[str]
) -> None:
    requests = Requests("porch")
    for name, sender, place in (
        ("a", "alice", None),
        ("b", "alice", "one"),
        ("c", "alice", "two"),
        ("d", "alice", "one"),
        ("e", "bob", "one"),
        ("f", "bob", None),
    ):
        assert requests.admit(RoutedPrompt("c0", prompt_of(name, sender, connection=place))) is None
    state = presence(Stamp("alice"), "client", online=online, connection=connection)
    assert [r.prompt.request for r in requests.gone(state, retained=retained)] == ended


def test_a_cancelled_text_ends_its_session_at_the_cloud_and_a_whole_one_does_not() -> None:
    async def scene(world: World) -> None:
        cloud = world.fleet.nodes["cloud"].service
        assert isinstance(cloud, CloudService)
        sessions = cloud.batcher.sessions
        async with world.client() as client:
            await client.write("a", TEXT, max_tokens=4, seed=SEED)
            assert len(sessions) == 1
            answer = client.ask("a", TEXT, max_tokens=60, seed=SEED)
            await anext(answer)
            assert len(sessions) == 2
            await answer.aclose()
            await asyncio.sleep(1.0)
            assert len(sessions) == 1
            assert cloud.batcher.idle

    played(scene)


def test_what_is_remembered_is_bounded() -> None:
    requests = Requests("a")
    for n in range(3 * REQUESTS_REMEMBERED):
        request = RoutedPrompt("c0", prompt_of(f"r{n}", "alice"))
        assert requests.admit(request) is None
        requests.close(request)
        requests.cancel(cancel_of(f"later{n}", "alice"))
    assert len(requests) == 2 * REQUESTS_REMEMBERED
    assert not requests.open
