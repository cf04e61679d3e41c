"""Every decoder as a target: bytes in, True (taken) or False (refused as documented) out; anything else is a bug."""

import math
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np

from cloud_verifier.coordinator import sample_of
from edge_agent import policy
from edge_agent.learner import Learner
from edge_agent.measures import measures_of
from edge_agent.policy import THRESHOLDS
from edge_broker.memory import ClusterMemory
from fedhlm.decoding.couplings import COUPLINGS, split_laws
from fedhlm.decoding.laws import decode_full, decode_lattice, decode_top_k
from fedhlm.decoding.tree import Branch, Tree, pack_branches, unpack_branches
from fedhlm.errors import ProtocolError
from fedhlm.learning.certificate import Certificate, CertificateState
from fedhlm.learning.curve import Curve, affine, correlation, isotonic, shrunk
from fedhlm.learning.federation import Members, mean_of_clusters
from fedhlm.learning.learnt_state import State
from fedhlm.learning.thresholds import KEEP_NONE, tau_of_budget
from fedhlm.peers.context_keys import DIMS, unpack_key
from fedhlm.peers.neighbours import Memory
from fedhlm.protocol import codec, messages, packing, topics
from fedhlm.settings import Federation
from fedhlm_lab.sim import toy
from tests.fuzz import mutators
from tests.fuzz.files import FILES, budget_config
from tests.fuzz.mutators import Rng
from tests.fuzz.target import Target, refusing, require

V: Final = toy.VOCAB_SIZE


# Messages


def _message(data: bytes) -> None:
    message = codec.decode(data)
    again = codec.encode(message)
    # As bytes, because a statistic may be NaN.
    require(codec.encode(codec.decode(again)) == again, f"{message!r} does not survive the codec")
    if isinstance(message, messages.Profile):
        sample_of(message)
    if isinstance(message, messages.Learned):
        restored = State.of(message).learned(_HEADER)
        codec.decode(codec.encode(restored))


_HEADER: Final[dict[str, Any]] = {"version": messages.SCHEMA_VERSION, "sender": "x", "sequence": 0, "sent_ms": 0}


def _named(data: bytes) -> None:
    """A topic's name, a zero byte, a payload."""
    name, _, payload = data.partition(b"\0")
    found = topics.lookup(name.decode("utf-8", "surrogateescape"))
    if found is None:
        raise ProtocolError("not a topic of ours")
    row, levels = found
    require(row.name(**levels).encode("utf-8", "surrogateescape") == name, f"{levels} do not give {name!r} back")
    topics.decode_for(row, payload)


def _named_seed(rng: Rng) -> bytes:
    name, payload = mutators.valid(rng)
    return name.encode() + b"\0" + payload


# Packed fields


def _curve(data: bytes) -> None:
    curve = Curve.from_bytes(data)
    require(curve.flaw() is None, "a flawed curve was taken")
    m = isotonic(curve)
    require(bool(((m >= 0.0) & (m <= 1.0)).all() and (np.diff(m) >= 0.0).all()), f"m is {m}")
    require(bool(np.isfinite(affine(curve)).all()) and -1.0 <= correlation(curve) <= 1.0, "a fit that is not finite")
    tau = tau_of_budget(curve, shrunk(curve, curve, 50.0), 0.05, 0.05)
    require(tau == KEEP_NONE or 0.0 <= tau <= 1.0, f"tau is {tau}")
    require(Curve.from_bytes(curve.to_bytes()).to_bytes() == curve.to_bytes(), "a curve changes on its way")


def _ids(data: bytes) -> None:
    vocab_size = V if len(data) % 2 else 1 << 20
    require(packing.pack_ids(packing.unpack_ids(data, vocab_size), vocab_size) == data, "ids change on their way")


def _probs(data: bytes) -> None:
    probs = packing.unpack_probs(data)
    require(bool(((probs >= 0.0) & (probs <= 1.0)).all()), f"probabilities {probs}")
    packing.unpack_bits(data, 9)


def _key(data: bytes) -> None:
    key = unpack_key(data)
    memory = Memory(4)
    memory.add(key, 1, "peer")
    memory.nearest(key, 1)


def _branches(data: bytes) -> None:
    length = data[0] % 20 if data else 0
    branches = unpack_branches(data[1:], V, length)
    Tree(range(length), branches).below(length)


def _branches_seed(rng: Rng) -> bytes:
    length = rng.randrange(20)
    made = [Branch(rng.randrange(length + 1 + i), rng.randrange(V)) for i in range(rng.choice((0, 1, 9, 99)))]
    return bytes([length]) + pack_branches(made, V)


_DECODERS: Final[tuple[Callable[[bytes, int], Any], ...]] = (
    decode_full,
    lambda data, vocab_size: decode_lattice(data, vocab_size, 30, 100).dense(vocab_size),
    decode_top_k,
)
_NAMES: Final = sorted(COUPLINGS)


def _laws(data: bytes) -> None:
    """The first byte chooses a coupling, the second how many laws follow; each is then used to settle a draft."""
    coupling, count = COUPLINGS[_NAMES[(data[0] if data else 0) % len(_NAMES)]], (data[1] if len(data) > 1 else 0) % 4
    for encoded in split_laws(coupling, data[2:], count, V):
        token = coupling.settle(toy.large_logits((1,)), messages.Sampling(1), 1, 5, encoded)
        require(0 <= token < V, f"settled {token}")


def _laws_seed(rng: Rng) -> bytes:
    number, count = rng.randrange(len(_NAMES)), rng.randrange(4)
    laws = [mutators._law(_NAMES[number], rng.randrange(64)) for _ in range(count)]
    return bytes([number, count]) + b"".join(laws)


def _law(data: bytes) -> None:
    """Each decoder of a single law in turn; what is taken sums to 1."""
    dense = _DECODERS[(data[0] if data else 0) % len(_DECODERS)](data[1:], V)
    require(abs(float(dense.sum()) - 1.0) < 1e-9 and float(dense.min()) >= 0.0, f"law {dense}")


def _law_seed(rng: Rng) -> bytes:
    number = rng.randrange(3)
    return bytes([number]) + mutators._law(("full", "lattice", "published-cu")[number], rng.randrange(64))


# State


def _certificate(data: bytes) -> None:
    try:
        known = Certificate.of(msgspec.msgpack.decode(data, type=CertificateState))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError("no state") from exc
    known.add(1, [1.0])
    require(0.0 <= known.floor(0.95) <= 1.0 and 0.0 <= known.limit(0.95) <= 1.0, "no limit")
    require(math.isfinite(known.estimate + known.standard_error), "no estimate")


def _certificate_seed(rng: Rng) -> bytes:
    known = Certificate()
    for _ in range(rng.randrange(5)):
        known.add(4, [rng.random()], 1, [rng.random()], probability=rng.choice((1.0, 0.5)))
    return msgspec.msgpack.encode(known.state())


def _memory(data: bytes) -> None:
    memory = Memory.restore(data, 8)
    again = Memory.restore(memory.snapshot(), 8)
    require(again.size == memory.size <= 8, "a memory changes on its way")


def _memory_seed(rng: Rng) -> bytes:
    memory = Memory(8)
    for token in range(rng.randrange(12)):
        memory.add(unpack_key(rng.randbytes(DIMS)), token, rng.choice(("peer", "neighbour")))
    return memory.snapshot()


def _cluster_memory(data: bytes) -> None:
    memory = ClusterMemory(8)
    memory.restore(data)
    memory.belong("t 48")
    ClusterMemory(8).restore(memory.snapshot())


def _cluster_memory_seed(rng: Rng) -> bytes:
    memory = ClusterMemory(8)
    items = tuple(messages.Verified(rng.randbytes(DIMS), token) for token in range(rng.randrange(12)))
    memory.belong("t 48")
    memory.hear(messages.VerifiedTokens(**_HEADER, space="s", items=items))
    return memory.snapshot()


def _members(data: bytes) -> None:
    members = Members(Federation(), mean_of_clusters)
    members.restore(data)
    codec.decode(codec.encode(members.close().learned(_HEADER)))
    Members(Federation(), mean_of_clusters).restore(members.snapshot())


def _members_seed(rng: Rng) -> bytes:
    members = Members(Federation(), mean_of_clusters)
    for number in range(rng.randrange(3)):
        message = mutators.typed(rng, messages.Contribution)
        members.take(f"m{number}", msgspec.structs.replace(message, version=messages.SCHEMA_VERSION), 0.0)
    members.close()
    return members.snapshot()


def _learner(data: bytes) -> None:
    learner = Learner(Federation(), np.random.default_rng(1))
    learner.restore(data)
    use_learner(learner)
    Learner(Federation(), np.random.default_rng(1)).restore(learner.snapshot())


def use_learner(learner: Learner) -> None:
    """What an agent does with what it has learnt: plan a generation, contribute to a round."""
    generation = budget_config().config.generation
    measures = measures_of(generation, messages.Sampling(1), learner.pair)
    knowledge = learner.knowledge(measures, generation)
    for rule in THRESHOLDS.values():
        tau = rule(knowledge, generation)
        require(tau == KEEP_NONE or 0.0 <= tau <= 1.0, f"tau is {tau}")
    similarity = policy.similarity(knowledge, generation)
    require(similarity is None or 0.0 <= similarity <= 1.0, f"similarity is {similarity}")
    known = learner.certificate(measures, generation)
    require(known is None or 0.0 <= known.limit(0.95) <= 1.0, "no limit")
    for optimiser in ("fedavg", "scaffold", "fedprox"):
        learning = msgspec.structs.replace(generation.learning, optimiser=optimiser)
        paper = msgspec.structs.replace(generation, threshold="paper-fl", learning=learning)
        number = learner.round
        learner._transmitted.append((0.5, 0.5))
        ended = learner.contribution(paper, 0.0)
        require(ended is not None, "no contribution")
        thresholds, curves = ended or ({}, {})
        sent = messages.Contribution(**_HEADER, round=number, members=1, thresholds=thresholds, curves=curves)
        codec.decode(codec.encode(sent))


def _learner_seed(rng: Rng) -> bytes:
    learner = Learner(Federation(), np.random.default_rng(1))
    measures = "closed-form/gumbel/sampled"
    learner.curves[measures] = Curve.from_bytes(mutators.curve(rng))
    learner.round = rng.randrange(4)
    learner._certificates[measures].add(4, [1.0])
    learner._paper[""].threshold = rng.choice((None, 0.3))
    return learner.snapshot()


def _learned(data: bytes) -> None:
    """A state that an edge sends, taken over by an agent and used."""
    message = codec.decode(data)
    if not isinstance(message, messages.Learned):
        raise ProtocolError("another message")
    learner = Learner(Federation(), np.random.default_rng(1))
    learner.learned(message)
    use_learner(learner)


def _learned_seed(rng: Rng) -> bytes:
    return codec.encode(msgspec.structs.replace(mutators.typed(rng, messages.Learned), version=messages.SCHEMA_VERSION))


DECODERS: Final[dict[str, Target]] = {
    "message": Target(refusing(_message), lambda rng: mutators.valid(rng).payload, 6.0, structured=True),
    "topic": Target(refusing(_named), _named_seed, 2.0),
    "ids": Target(refusing(_ids), lambda rng: mutators._ids(rng, rng.randrange(40))),
    "probs": Target(refusing(_probs), lambda rng: np.array([rng.random() for _ in range(9)], "<f2").tobytes()),
    "key": Target(refusing(_key), lambda rng: rng.randbytes(DIMS)),
    "curve": Target(refusing(_curve), mutators.curve),
    "branches": Target(refusing(_branches), _branches_seed),
    "laws": Target(refusing(_laws), _laws_seed),
    "law": Target(refusing(_law), _law_seed),
    "certificate": Target(refusing(_certificate), _certificate_seed, 0.5, structured=True),
    "memory": Target(refusing(_memory), _memory_seed, 0.5, structured=True),
    "cluster-memory": Target(refusing(_cluster_memory), _cluster_memory_seed, 0.5, structured=True),
    "members": Target(refusing(_members), _members_seed, 0.5, structured=True),
    "learner": Target(refusing(_learner), _learner_seed, 0.5, structured=True),
    "learned": Target(refusing(_learned), _learned_seed, 0.5, structured=True),
    **FILES,
}
