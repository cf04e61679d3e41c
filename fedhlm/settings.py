"""Every setting: its type, limits, default and meaning. `fedhlm.config` reads and merges them."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fedhlm.bus.broker_url import BrokerUrl, TlsFiles
from fedhlm.protocol import messages, topics

DEFAULT_PRESET: Final = "budget"
MASK: Final = "***"

Port = Annotated[int, Meta(ge=0, le=65_535)]
Threads = Annotated[int, Meta(ge=0, le=256)]
BatchSize = Annotated[int, Meta(ge=1, le=messages.MAX_BATCH)]
Unit = messages.Unit
WaitMs = Annotated[float, Meta(ge=0.0, le=60_000.0)]
# Those of onnxruntime that exist for Linux; which of them a build has, is known where it runs.
Provider = Literal[
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "MIGraphXExecutionProvider",
    "OpenVINOExecutionProvider",
    "DnnlExecutionProvider",
    "XnnpackExecutionProvider",
    "ACLExecutionProvider",
    "QNNExecutionProvider",
]
BlockSize = Annotated[int, Meta(ge=1, le=messages.MAX_BLOCK)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of keys. Passwords never show in its repr."""

    def __repr__(self) -> str:
        shown = (f"{name}={masked(name, getattr(self, name))!r}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({', '.join(shown)})"


class Broker(Section, frozen=True):
    """An MQTT broker. An empty `url` means none: an edge then starts its own. TLS comes with the scheme mqtts.

    A link that has died in silence is noticed after up to twice `keepalive_s`.
    """

    url: str = ""
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    username: str = ""
    password: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    connect_timeout_s: Annotated[float, Meta(gt=0.0, le=3_600.0)] = 10.0
    keepalive_s: Annotated[int, Meta(ge=1, le=65_535)] = 30
    root: Annotated[str, Meta(min_length=1, max_length=256)] = topics.DEFAULT_ROOT

    def address(self, *, key: str = "broker.url") -> BrokerUrl:
        """The parsed `url` with user, password and TLS files of these keys before those of the URL itself.

        Raises:
            ConfigError: no URL, or one that cannot be used; `key` names it.
        """
        files = TlsFiles(self.ca or None, self.cert or None, self.key or None)
        parsed = BrokerUrl.parse(self.url, files=files if any(files) else None, key=key)
        return msgspec.structs.replace(
            parsed, username=self.username or parsed.username, password=self.password or parsed.password
        )


class Cluster(Section, frozen=True):
    """The group of agents that share one edge."""

    name: messages.Name = "home"


class Agent(Section, frozen=True):
    """A device. An empty `model` is the shipped SLM; 0 threads leave the choice to the runtime.

    What it has learnt is kept in the folder `state`; an empty one keeps nothing over a restart. The first of `providers`
    that takes an operation computes it; the processor does where none does, and for all when none is named.
    """

    id: messages.Name = "agent"
    model: str = ""
    state: str = ""
    threads: Threads = 0
    providers: tuple[Provider, ...] = ()


class Edge(Section, frozen=True):
    """The cluster's edge: the broker on its cloud side, batching, and the broker it starts when it is given none.

    Sums and verified tokens are kept in the folder `state`; an empty one keeps nothing over a restart.
    """

    upstream: Broker = Broker()
    state: str = ""
    memory: Annotated[int, Meta(ge=1, le=1_000_000)] = 16_384
    batch_max: BatchSize = 64
    batch_wait_ms: WaitMs = 2.0
    embedded_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    embedded_port: Port = 1883


class Cloud(Section, frozen=True):
    """The verifier. An empty `model` is the shipped LLM; `sessions_max` bounds the key-value caches kept.

    The federation's sums are kept in the folder `state`; an empty one keeps nothing over a restart. `providers` as for an agent.
    """

    model: str = ""
    state: str = ""
    threads: Threads = 0
    providers: tuple[Provider, ...] = ()
    sessions_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 64
    batch_max: BatchSize = 64
    batch_wait_ms: WaitMs = 2.0


class Pipeline(Section, frozen=True):
    """How far drafting runs ahead of the verdicts, in tokens; `remote` lets the cloud decode `block` tokens at a time.

    `bonus` asks for a token of the LLM's own after each accepted block (always so in `async`).
    Drafting pauses when the tail is likelier than 1 - `survival_floor` to be rejected somewhere (`async`).
    A tree (`tree`) has at most `nodes` nodes; fewer where the measured delay does not repay them.
    A block leaves when it is full, when drafting pauses, when a draft's uncertainty passes `flush_uncertainty`, or at `flush_age_ms`.
    """

    kind: Literal["blocking", "async", "remote", "tree"] = "async"
    window: BlockSize = 16
    block: BlockSize = 8
    flush_uncertainty: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    flush_age_ms: WaitMs = 200.0
    survival_floor: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.03
    bonus: bool = True
    nodes: Annotated[int, Meta(ge=1, le=1_024)] = 64


class Consensus(Section, frozen=True):
    """When peers may settle a token: the cosine from which contexts count as near, how many of the nearest verified ones
    must agree, and how many are remembered. `adapt` raises the similarity so that wrong hits stay below `error_share` of
    the budget, and lets no peer settle anything before there is evidence for that. Peers settle a draft that they agree with; another token of theirs takes its place from `replace` on, and
    is verified then. Prices are per byte: one in the cluster costs `lan_price` of one to the cloud.
    """

    similarity: Unit = 0.8
    replace: Annotated[float, Meta(ge=0.0, le=2.0)] = 2.0
    votes: Annotated[int, Meta(ge=1, le=64)] = 3
    size: Annotated[int, Meta(ge=1, le=1_000_000)] = 4_096
    adapt: bool = True
    error_share: Unit = 0.2
    lan_price: Annotated[float, Meta(ge=0.0, le=1_000.0)] = 0.1
    max_age_s: Annotated[float, Meta(gt=0.0, le=86_400.0)] = 600.0


class Learning(Section, frozen=True):
    """How the threshold is learnt. An agent contributes after `round_tokens` tokens, and when what it has seen has grown by
    the share `growth` since: often at first, seldom later. Something new goes out after `round_s` seconds in any case.

    `paper-fl` (FedHLM eqs 4-8) uses gamma, the learning rate (divided by 1 + decay x round), `regularisation` (lambda) and
    the optimiser. `calibrated-fl` shrinks the device's curve to its cluster's by `shrinkage` tokens, forgets by `forgetting` a
    round, and skips as much as the budget allows, or, with the objective `price`, what costs less than the harm it does:
    a wrong token is worth `harm_bytes`, a round trip `round_trip_bytes`.
    """

    round_tokens: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 32
    round_s: Annotated[float, Meta(gt=0.0, le=86_400.0)] = 60.0
    growth: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.1
    gamma: Annotated[float, Meta(gt=0.0, le=1_000.0)] = 10.0
    learning_rate: Annotated[float, Meta(gt=0.0, le=100.0)] = 0.001
    decay: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.1
    regularisation: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.01
    optimiser: Literal["fedavg", "fedprox", "scaffold", "fednova"] = "fedavg"
    proximal: Annotated[float, Meta(ge=0.0, le=1_000.0)] = 0.1
    local_steps: Annotated[int, Meta(ge=1, le=1_000)] = 1
    objective: Literal["budget", "price"] = "budget"
    shrinkage: Annotated[float, Meta(ge=0.0, le=1_000_000.0)] = 50.0
    forgetting: Unit = 0.0
    harm_bytes: Annotated[float, Meta(gt=0.0, le=1_000_000_000.0)] = 1_000.0
    round_trip_bytes: Annotated[float, Meta(ge=0.0, le=1_000_000_000.0)] = 100.0


class Generation(Section, frozen=True):
    """The mode (coupling, gate, peers, threshold, pipeline), the law of the tokens, and the patience with the cloud.

    `tau` is the threshold on the uncertainty, where learning starts from; `send_probability` is that of the random gate.
    `budget` bounds the mean total variation per token that skipping may cost, shown with a limit at `confidence`; the end
    of a text that nobody verified is audited with probability `audit` for each token that was asked for.
    An escalation is sent again after `retry_ms`; at `deadline_ms` its tokens are committed unverified.
    """

    coupling: Literal["gumbel", "greedy", "full", "lattice", "published-cu", "published-cu-online"] = "gumbel"
    uncertainty: Literal["closed-form", "k-sample", "entropy"] = "closed-form"
    gate: Literal["always", "never", "random", "threshold"] = "always"
    peers: Literal["none", "centroid", "neighbour"] = "none"
    threshold: Literal["none", "fixed", "paper-fl", "calibrated-fl"] = "none"
    tau: Unit = 0.43
    send_probability: Unit = 0.7
    budget: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.05
    confidence: Annotated[float, Meta(ge=0.5, le=0.9999)] = 0.95
    audit: Unit = 0.0
    consensus: Consensus = Consensus()
    learning: Learning = Learning()
    pipeline: Pipeline = Pipeline()
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.8
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    seed: messages.Seed = 0
    max_tokens: Annotated[int, Meta(ge=1, le=messages.MAX_TOKENS)] = 64
    deadline_ms: Annotated[int, Meta(ge=1, le=3_600_000)] = 10_000
    retry_ms: Annotated[int, Meta(ge=1, le=3_600_000)] = 1_000


class Federation(Section, frozen=True):
    """Rounds and robustness, at edge and cloud: new state goes out after `round_updates` contributions or `round_s` seconds.

    A cluster's state begins with at most `prior_tokens` tokens' worth of what the others know.
    A member's weight is capped at `weight_cap` tokens; from five members on the share `trim` of the ratios in each bin
    is cut at either end (rounded down: 0.1 cuts from ten members on). With `epsilon` above 0 an agent adds Gaussian noise to its sums, for (epsilon, delta) over `releases`
    contributions, after which it sends none. Every `assign_s` seconds the cloud regroups the agents (0: never).
    """

    round_updates: Annotated[int, Meta(ge=1, le=1_000_000)] = 16
    prior_tokens: Annotated[float, Meta(ge=0.0, le=1e12)] = 4_096.0
    round_s: Annotated[float, Meta(gt=0.0, le=86_400.0)] = 2.0
    weight_cap: Annotated[float, Meta(gt=0.0, le=1e12)] = 1e6
    trim: Annotated[float, Meta(ge=0.0, le=0.5)] = 0.1
    epsilon: Annotated[float, Meta(ge=0.0, le=1_000.0)] = 0.0
    delta: Annotated[float, Meta(gt=0.0, lt=1.0)] = 1e-6
    releases: Annotated[int, Meta(ge=1, le=1_000_000)] = 1_000
    assign_s: Annotated[float, Meta(ge=0.0, le=86_400.0)] = 0.0


class Telemetry(Section, frozen=True):
    """Logs and metrics; port 0 exports no metrics. With `journal` a part publishes what it took in and decided, so that a
    recording of the bus can be decided again (`fedhlm replay --check`); its traffic doubles at least.
    """

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    metrics_host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    metrics_port: Port = 0
    journal: bool = False


class Config(Section, frozen=True):
    """Everything. `preset` is a shipped preset's name or the path of a preset file."""

    preset: Annotated[str, Meta(min_length=1)] = DEFAULT_PRESET
    broker: Broker = Broker()
    cluster: Cluster = Cluster()
    agent: Agent = Agent()
    edge: Edge = Edge()
    cloud: Cloud = Cloud()
    generation: Generation = Generation()
    federation: Federation = Federation()
    telemetry: Telemetry = Telemetry()


def is_secret(key: str) -> bool:
    """Whether a key, perhaps a misspelt one, is meant to hold a password."""
    name = key.rpartition(".")[2]
    return name.startswith("pas") or "pwd" in name or "secret" in name


def masked(key: str, value: object) -> object:
    """`value` for human eyes: no password, and no address that carries one."""
    text = str(value)
    return MASK if value and (is_secret(key) or ("://" in text and "@" in text)) else value
