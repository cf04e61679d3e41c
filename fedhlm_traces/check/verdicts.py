"""Settle recorded blocks again, session by session, and compare the verdicts.

Some events are not in the journal: the cloud may have evicted a session before a block that primes it again, and may
have settled a block without an answer. Each such case is tried. If the recorded verdict follows from one, it counts
as equal.
"""

import copy
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from cloud_verifier.coordinator import Coordinator
from cloud_verifier.engine import Engine, EngineFailure, EngineInput, EngineOutput
from cloud_verifier.journal import CloudStart
from cloud_verifier.service import FEDERATION_FILE, CloudService
from cloud_verifier.sessions import Key, Sessions, StaleBlock
from cloud_verifier.verdicts import MODEL_FAILED
from cloud_verifier.wiring import LargeModel, cloud_of
from fedhlm import settings
from fedhlm.bus.party import Received
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.sampling import ACCEPT_STREAM, RESAMPLE_STREAM, gumbel, law, scores, uniform
from fedhlm.errors import ProtocolError
from fedhlm.learning.federation import Members, mean_of_clusters
from fedhlm.process.runtime import Runtime
from fedhlm.process.saver import inline
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    Escalation,
    EscalationBatch,
    RoutedEscalation,
    RoutedVerdict,
    Sampling,
    Verdict,
    VerdictBatch,
)
from fedhlm.protocol.packing import unpack_ids
from fedhlm.settings import Config
from fedhlm.telemetry import Counters
from fedhlm_traces.check.captured import CapturingBus, recorded_store
from fedhlm_traces.spelling import Spell

PROB_UNITS: Final = 2  # float16 steps by which probabilities may differ between machines and batches
CACHES_MAX: Final = 64
_HEADER: Final[dict[str, Any]] = {"version": SCHEMA_VERSION, "sender": "edge", "sequence": 0, "sent_ms": 0}


class Verifier:
    """Settles the blocks of one life's sessions again with `engine`."""

    def __init__(self, born: CloudStart, engine: Engine) -> None:
        self._born = born
        self._engine = engine
        self._sessions: OrderedDict[Key, Sessions] = OrderedDict()  # one each, to restore states
        self._unanswered: dict[Key, list[Escalation]] = {}

    async def settle(self, key: Key, escalation: Escalation, recorded: Verdict) -> Verdict | None:
        """Return today's verdict, or None for an outdated block.

        `recorded` selects among the histories that may have happened.
        """
        if recorded.status == "unprimed" or (recorded.status == "refused" and recorded.reason.startswith(MODEL_FAILED)):
            self._sessions.pop(key, None)
        if recorded.status == "refused" and recorded.reason.startswith(MODEL_FAILED):
            return recorded
        before = self._taken(key)
        likeliest = copied(before, key)
        verdict = await self._run(likeliest, key, escalation)
        chosen = likeliest
        if not agree(recorded, verdict):
            async for world, other in self._others(key, escalation, before):
                if agree(recorded, other):
                    chosen, verdict = world, other
                    break
        self._unanswered.pop(key, None)
        self._keep(key, chosen, verdict)
        return verdict

    async def pass_over(self, key: Key, escalation: Escalation) -> bool:
        """Pass a block without an answer; return whether today's cloud drops it too, as a newer one has passed."""
        world = copied(self._taken(key), key)
        if isinstance(world.admit(key, escalation), StaleBlock):
            self._keep(key, world, None)
            return True
        self._unanswered.setdefault(key, []).append(escalation)
        return False

    async def _others(
        self, key: Key, escalation: Escalation, before: Sessions
    ) -> AsyncIterator[tuple[Sessions, Verdict | None]]:
        """Yield other histories that may have preceded this block."""
        if escalation.prime is not None:
            world = no_sessions(self._born)
            yield world, await self._run(world, key, escalation)
        if key in self._unanswered:
            world = copied(before, key)
            for earlier in self._unanswered[key]:
                await self._run(world, key, earlier)
            yield world, await self._run(world, key, escalation)

    def _taken(self, key: Key) -> Sessions:
        return self._sessions.get(key) or no_sessions(self._born)

    def _keep(self, key: Key, world: Sessions, verdict: Verdict | None) -> None:
        if verdict is not None and verdict.status == "unprimed":
            self._sessions.pop(key, None)  # its agent primes it again, whatever the cloud held
            return
        self._sessions[key] = world
        self._sessions.move_to_end(key)
        if len(self._sessions) > CACHES_MAX:
            oldest = list(self._sessions)[-CACHES_MAX - 1]
            entry = self._sessions[oldest].entry(oldest)
            if entry is not None:
                entry.cache, entry.cached = None, 0

    async def _run(self, world: Sessions, key: Key, escalation: Escalation) -> Verdict | None:
        """Today's verdict on one block, starting from `world`."""
        bus = CapturingBus(lambda _number: True)
        service = service_of(self._born, self._engine, bus, sessions=world)
        levels = {"cluster": key.cluster}
        message = EscalationBatch(**_HEADER, items=(RoutedEscalation(key.agent, escalation),))
        await service.handle(Received(topics.CLOUD_VERIFY, levels, message))
        while await service.verify_next():
            pass
        verdicts = [
            answered.verdict
            for sent in bus.take()
            if sent.name == topics.CLOUD_VERDICT.name(self._born.root, **levels)
            for answered in _answers(sent.payload)
            if answered.agent == key.agent
        ]
        return verdicts[-1] if verdicts else None

    async def told(
        self, key: Key, escalation: Escalation, then: Verdict, now: Verdict | None, spell: Spell
    ) -> "ToldVerdicts":
        """Describe a divergence."""
        session = self._sessions.get(key)
        entry = session.entry(key) if session is not None else None
        sampling = entry.state.sampling if entry else escalation.prime.sampling if escalation.prime else None
        return await ToldVerdicts.of(
            escalation,
            then,
            now,
            engine=self._engine,
            vocab_size=self._born.fingerprint.vocab_size,
            sampling=sampling,
            context=entry.state.context if entry else [],
            spell=spell,
        )


def large_of(born: CloudStart, engine: Engine) -> LargeModel:
    """The model that this cloud had, run by `engine`."""
    return LargeModel(engine, born.fingerprint, born.eos_ids, born.context_max)


def no_sessions(born: CloudStart) -> Sessions:
    """A store for one session, with this cloud's parameters."""
    return large_of(born, _NO_MODEL).sessions(1)


def service_of(
    born: CloudStart,
    engine: Engine | None,
    bus: CapturingBus,
    *,
    sessions: Sessions,
    clock_s: Callable[[], float] = lambda: 0.0,
    wall_s: Callable[[], float] = lambda: 0.0,
) -> CloudService:
    """Today's cloud with the settings and the federation at the start of this life; it sends on `bus`.

    Without an `engine` it cannot verify. Agents are never assigned to other clusters.
    """
    store = recorded_store({FEDERATION_FILE: born.members})
    return cloud_of(
        Config(broker=settings.Broker(root=born.root), cloud=settings.Cloud(batch_max=1), federation=born.federation),
        Runtime(Counters(), wall_s=wall_s, clock_s=clock_s, in_thread=inline, store=store),
        large_of(born, engine or _NO_MODEL),
        open_bus=bus.opened,
        sessions=sessions,
        coordinator=Coordinator(Members(born.federation, mean_of_clusters, of_clusters=True)),
    )


async def _no_model(_requests: Sequence[EngineInput]) -> list[EngineOutput]:
    raise RuntimeError("nothing is verified without the model")


_NO_MODEL: Final = Engine(None, _no_model)


def _answers(payload: bytes) -> tuple[RoutedVerdict, ...]:
    message = decode(payload)
    return message.items if isinstance(message, VerdictBatch) else ()


def copied(sessions: Sessions, key: Key) -> Sessions:
    """A copy for a trial; the cache is immutable and stays shared."""
    entry = sessions.entry(key)
    return copy.deepcopy(sessions, {} if entry is None else {id(entry.cache): entry.cache})


def agree(recorded: Verdict, now: Verdict | None) -> bool:
    """Whether two verdicts on one block agree.

    The reason of a refusal is not compared; probabilities may differ by PROB_UNITS.
    """
    if now is None:
        return False
    if recorded.status != now.status:
        return False
    if recorded.status != "settled":
        return True
    fields = ("accepted", "ids", "missed")
    return all(getattr(recorded, f) == getattr(now, f) for f in fields) and _near(recorded, now)


def _near(a: Verdict, b: Verdict) -> bool:
    x, y = (np.frombuffer(v.target_probs, "<i2").astype(np.int64) for v in (a, b))  # (n,) steps of float16
    return len(x) == len(y) and bool((np.abs(x - y) <= PROB_UNITS).all())


class ToldVerdicts(NamedTuple):
    """Two verdicts on one block in words, and why they differ."""

    where: str
    recorded: str
    now: str
    why: str

    @classmethod
    async def of(
        cls,
        escalation: Escalation,
        then: Verdict,
        now: Verdict | None,
        *,
        engine: Engine,
        vocab_size: int,
        sampling: Sampling | None,
        context: list[int],
        spell: Spell,
    ) -> "ToldVerdicts":
        """Find the first token that differs, and ask the model for its law there."""
        if now is None or then.status != "settled" or now.status != "settled" or sampling is None:
            where = f"block at position {escalation.base}"
            why = f"epoch {escalation.epoch}, {'with' if escalation.prime else 'without'} a prime"
            return cls(where, _status(then), _status(now), why)
        try:
            ids, old, new = (unpack_ids(data, vocab_size) for data in (escalation.ids, then.ids, now.ids))
        except ProtocolError as exc:
            return cls(f"block at position {escalation.base}", _status(then), _status(now), str(exc))
        a, b = ids[: then.accepted] + old, ids[: now.accepted] + new
        place = next((i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]), None)
        if place is None:
            place = _place_of_numbers(then, now)
        position = escalation.base + place
        recorded = _token_words(then, ids, a, place, spell)
        decided = _token_words(now, ids, b, place, spell)
        why = _why_probs(then, now, place)
        if a[place : place + 1] != b[place : place + 1] and len(context) >= position:
            tokens = [t[place] for t in (a, b) if place < len(t)]
            why += "; " + await _why_law(engine, context[:position], sampling, position, tokens, spell)
        return cls(f"token at position {position}", recorded, decided, why)


def _status(verdict: Verdict | None) -> str:
    if verdict is None:
        return "no answer: a newer block of the session has passed"
    if verdict.status == "settled":
        return f"settled, {verdict.accepted} accepted"
    return f"{verdict.status} {verdict.reason}".rstrip()


def _probs(verdict: Verdict) -> list[float]:
    return [float(p) for p in np.frombuffer(verdict.target_probs, "<f2")]


def _place_of_numbers(then: Verdict, now: Verdict) -> int:
    """The first probability or missed bit that differs where the tokens are equal."""
    x, y = (np.frombuffer(v.target_probs, "<i2").astype(np.int64) for v in (then, now))
    count = min(len(x), len(y))
    return int(np.flatnonzero(np.append(np.abs(x[:count] - y[:count]) > PROB_UNITS, True))[0])


def _token_words(verdict: Verdict, ids: list[int], emitted: list[int], place: int, spell: Spell) -> str:
    probs = _probs(verdict)
    p = f", p(d) {probs[place]:.4g}" if place < len(probs) else ""
    if place >= len(emitted):
        return f"nothing: the answer ends before this token{p}"
    token = spell(emitted[place])
    if place < verdict.accepted:
        return f"draft {token} stands{p}"
    if place == verdict.accepted and place < len(ids):
        return f"draft {spell(ids[place])} is replaced by {token}{p}"
    return f"{token}, the model's own"


def _why_probs(then: Verdict, now: Verdict, place: int) -> str:
    x, y = _probs(then), _probs(now)
    for i in range(min(len(x), len(y), place + 1)):
        units = abs(int(np.float16(x[i]).view(np.int16)) - int(np.float16(y[i]).view(np.int16)))
        if units > PROB_UNITS:
            return f"the model's law is another: p of draft {i} of the block was {x[i]:.4g} and is {y[i]:.4g}"
    if then.missed != now.missed and then.accepted == now.accepted:
        return "the model's probabilities are the same, so the rule for missed tokens has changed"
    return "the model's probabilities are the same, so the rule that settles has changed"


async def _why_law(
    engine: Engine, context: list[int], sampling: Sampling, position: int, tokens: list[int], spell: Spell
) -> str:
    """What law, noise and coupling say about each token."""
    if not context:
        return "its context is empty"
    (output,) = await engine.forward([EngineInput(engine.empty_cache, context, 1)])
    if isinstance(output, EngineFailure):
        return output.reason
    row = output.logits[-1]
    p = law(row, sampling)
    facts = [f"p({spell(token)}) is {p[token]:.4g}" for token in tokens]
    coupling = COUPLINGS.get(sampling.coupling)
    if coupling is not None and coupling.shared and not coupling.greedy:
        noisy = scores(row, sampling) + gumbel(sampling.seed, position, len(row))
        facts += [f"with the seed's noise {spell(token)} scores {noisy[token]:.5g}" for token in tokens]
        facts.append(f"the best is {spell(int(np.argmax(noisy)))}")
    elif coupling is not None and not coupling.shared:
        facts.append(f"u to accept is {uniform(sampling.seed, position, ACCEPT_STREAM):.4g}")
        facts.append(f"u to resample {uniform(sampling.seed, position, RESAMPLE_STREAM):.4g}")
    else:
        facts.append(f"the likeliest is {spell(int(np.argmax(row)))}")
    return ", ".join(facts)
