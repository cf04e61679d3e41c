"""All settings: type, limits, default, description. `fedhlm.config` merges them, and `fedhlm.explain` explains them."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fedhlm.bus.broker_url import BrokerUrl, TlsFiles
from fedhlm.protocol import fields, topics
from fedhlm.settings.cloud import Cloud
from fedhlm.settings.generation import Consensus, Generation, Learning, Pipeline
from fedhlm.settings.model_server import ModelServer
from fedhlm.settings.section import (
    MASK,
    BatchSize,
    GgufContext,
    Provider,
    Section,
    Threads,
    WaitMs,
    is_secret,
    masked,
)

__all__ = [
    "DEFAULT_PRESET",
    "MASK",
    "Agent",
    "Api",
    "Broker",
    "Cloud",
    "Cluster",
    "Config",
    "Consensus",
    "Edge",
    "Federation",
    "Generation",
    "Learning",
    "ModelServer",
    "Pipeline",
    "Section",
    "Telemetry",
    "is_secret",
    "masked",
]

DEFAULT_PRESET: Final = "budget"

Port = Annotated[int, Meta(ge=0, le=65_535)]


class Broker(Section, frozen=True):
    """An MQTT broker, and how to connect to it."""

    url: Annotated[
        str,
        Meta(
            description="Address, mqtt://[user:password@]host[:port], or mqtts:// for TLS. Empty: an edge starts "
            "its own broker on `edge.embedded_host`, and an agent or a cloud uses "
            "mqtt://127.0.0.1:1883. An edge without `edge.upstream.url` reaches the cloud over the "
            "broker of its cluster."
        ),
    ] = ""
    protocol: Annotated[
        Literal["auto", "5", "3.1.1"],
        Meta(description="Version of MQTT. auto tries 5, and 3.1.1 if the broker rejects 5."),
    ] = "auto"
    username: Annotated[str, Meta(description="User name at the broker. It overrides the one in `url`.")] = ""
    password: Annotated[
        str,
        Meta(
            description="Password of `username`. It overrides the one in `url`. Set it in a file or in the environment."
        ),
    ] = ""
    ca: Annotated[
        str,
        Meta(description="PEM file of the CAs that may sign the broker's certificate. Empty: those of the system."),
    ] = ""
    cert: Annotated[str, Meta(description="PEM file of this party's own certificate, for mutual TLS; needs `key`.")] = (
        ""
    )
    key: Annotated[str, Meta(description="PEM file of the private key of `cert`, without a passphrase.")] = ""
    connect_timeout_s: Annotated[
        float, Meta(gt=0.0, le=3_600.0, description="Seconds to wait for a connection before it is tried again.")
    ] = 10.0
    keepalive_s: Annotated[
        int,
        Meta(
            ge=1,
            le=65_535,
            description="Seconds of silence before the connection is probed. A dead link is noticed after up to "
            "twice this time. Lower costs a few bytes per probe.",
        ),
    ] = 30
    root: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=256,
            description="First levels of every topic, without wildcards. Fleets on one broker need different roots.",
        ),
    ] = topics.DEFAULT_ROOT

    def address(self, *, key: str = "broker.url") -> BrokerUrl:
        """Parse `url`. User, password and TLS files of the other keys override those of the URL.

        Raises:
            ConfigError: the URL is missing or cannot be used. `key` is its name in the error.
        """
        files = TlsFiles(self.ca or None, self.cert or None, self.key or None)
        parsed = BrokerUrl.parse(self.url, files=files if any(files) else None, key=key)
        return msgspec.structs.replace(
            parsed, username=self.username or parsed.username, password=self.password or parsed.password
        )


class Cluster(Section, frozen=True):
    """The group of agents that share one edge."""

    name: Annotated[fields.Name, Meta(description="Name of the cluster, a level of its topics.")] = "home"


class Agent(Section, frozen=True):
    """An agent: the program on a device, which drafts with the small model."""

    id: Annotated[fields.Name, Meta(description="Name of the agent, a level of its topics; unique in its cluster.")] = (
        "agent"
    )
    model: Annotated[
        str, Meta(description="Folder (ONNX) or GGUF file of the small model. Empty: the shipped one.")
    ] = ""
    context: GgufContext = 4_096
    target_tokenizer: Annotated[
        str,
        Meta(
            description="Folder or GGUF file with the tokenizer of the cloud's model, if that of `model` is another one; "
            "weights are not needed. Drafts are then made in its ids (docs/models.md). Empty: both have one tokenizer."
        ),
    ] = ""
    state: Annotated[
        str,
        Meta(
            description="Folder in which the agent keeps what it has learnt. Empty: nothing survives a restart. "
            "Files are replaced atomically. A damaged file is put aside with a warning."
        ),
    ] = ""
    presets: Annotated[
        tuple[str, ...],
        Meta(
            description="Shipped presets that prompts may name besides the agent's own; names between commas in the environment "
            "and on the command line. Empty: those that let the text go no farther than the agent's own (docs/security.md)."
        ),
    ] = ()
    threads: Annotated[Threads, Meta(description="Threads of the model. 0: onnxruntime's choice.")] = 0
    providers: Annotated[
        tuple[Provider, ...],
        Meta(
            description="Execution providers of onnxruntime in order of preference, separated by commas in the "
            "environment and on the command line. Absent ones are left out with one warning. The CPU is "
            "always the last. Empty: the CPU only."
        ),
    ] = ()


class Api(Section, frozen=True):
    """The APIs of OpenAI and Ollama over HTTP, at an agent or a cloud (docs/api.md)."""

    listen: Annotated[
        str,
        Meta(
            description="Address HOST:PORT on which an agent or a cloud serves them, as with --serve. Empty: it does not. "
            "Port 0 is any free port. Without `keys` it must be a loopback address."
        ),
    ] = ""
    keys: Annotated[
        str,
        Meta(
            description="File of API keys that only its owner can read, with a name and a key on each line. Each name "
            "is a client of its own in the queue. Empty: no key is needed."
        ),
    ] = ""
    rate: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1e6,
            description="Most requests for a text per minute and key; a quarter of them may come at once. 0: any number.",
        ),
    ] = 0.0


class HomeAssistant(Section, frozen=True):
    """A part as a device of Home Assistant, by its MQTT discovery (docs/home-assistant.md)."""

    enabled: Annotated[
        bool,
        Meta(
            description="Whether an agent or an edge publishes a device of Home Assistant on its cluster's broker. An "
            "edge also says there when one of its agents comes or goes."
        ),
    ] = False
    client: Annotated[
        fields.Name,
        Meta(
            description="Name of Home Assistant as a client, which is that of its certificate where the broker has "
            "access rules. An agent is asked by this client only."
        ),
    ] = "homeassistant"
    period_s: Annotated[
        float,
        Meta(
            ge=10.0,
            le=3_600.0,
            description="Seconds between two messages with the values of the sensors. A value that is three periods "
            "old is shown as unavailable.",
        ),
    ] = 30.0


class A2a(Section, frozen=True):
    """An agent for other programs' agents, by EMQX's convention of A2A over MQTT (docs/a2a.md)."""

    enabled: Annotated[
        bool,
        Meta(
            description="Whether an agent publishes its A2A card on its cluster's broker and serves requests there. An "
            "edge says there when one of its agents comes or goes. It needs MQTT 5."
        ),
    ] = False
    org: Annotated[
        fields.Name,
        Meta(
            description="Name of the organization in the topics of A2A; the unit is the cluster. Fleets on one broker "
            "need different ones, and agents and edges of a fleet the same."
        ),
    ] = "fedhlm"


class Edge(Section, frozen=True):
    """The edge of a cluster, which relays and batches blocks and remembers verified tokens."""

    upstream: Broker = Broker()
    state: Annotated[
        str,
        Meta(
            description="Folder for the federation's sums and the verified tokens. Empty: nothing survives a restart."
        ),
    ] = ""
    memory: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Verified tokens that the edge remembers for its cluster (`generation.peers`). 0: none, so that "
            "it answers no block itself.",
        ),
    ] = 16_384
    batch_max: Annotated[
        BatchSize, Meta(description="Most escalations in a batch to the cloud. More agents need a larger batch.")
    ] = 64
    batch_wait_ms: Annotated[
        WaitMs, Meta(description="Milliseconds that an escalation waits for others to fill its batch (`batch_max`).")
    ] = 2.0
    agent_messages_s: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1e6,
            description="Messages a second that the edge takes from one agent, after a burst of four seconds' worth. "
            "Blocks beyond it are refused at once, other messages dropped. 0: no limit.",
        ),
    ] = 500.0
    agent_bytes_s: Annotated[
        float,
        Meta(ge=0.0, le=1e12, description="Bytes a second that the edge takes from one agent, as `agent_messages_s`."),
    ] = 8.0 * 1024 * 1024
    embedded_host: Annotated[
        str,
        Meta(
            min_length=1,
            description="Address on which an edge without `broker.url` starts its own broker. It must be a loopback "
            "address, since that broker has no users and passwords.",
        ),
    ] = "127.0.0.1"
    embedded_port: Annotated[Port, Meta(description="TCP port of that broker (`embedded_host`). 0: any free port.")] = (
        1883
    )


class Federation(Section, frozen=True):
    """Rounds and robustness of the federation, at edge and cloud."""

    round_updates: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Contributions after which a round ends, if `round_s` does not end it first.",
        ),
    ] = 16
    prior_tokens: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1e12,
            description="Most scored tokens of other clusters that count for a cluster. 0: none count.",
        ),
    ] = 4_096.0
    round_s: Annotated[
        float,
        Meta(
            gt=0.0,
            le=86_400.0,
            description="Seconds after the first contribution of a round at which the round ends.",
        ),
    ] = 2.0
    weight_cap: Annotated[
        float, Meta(gt=0.0, le=1e12, description="Most tokens that one member counts for, whatever it claims.")
    ] = 1e6
    trim: Annotated[
        float,
        Meta(
            ge=0.0,
            le=0.5,
            description="Share of the members' ratios that is cut at either end of each bin with five or more "
            "members. It is rounded down to whole members: 0.1 cuts from ten members on.",
        ),
    ] = 0.1
    epsilon: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1_000.0,
            description="Above 0: an agent adds Gaussian noise to its sums, for (epsilon, `delta`)-privacy over "
            "`releases` contributions. Set it at the agents.",
        ),
    ] = 0.0
    delta: Annotated[
        float, Meta(gt=0.0, lt=1.0, description="Failure probability delta of the privacy of `epsilon`.")
    ] = 1e-6
    releases: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Contributions that share the privacy budget `epsilon`. After them an agent sends no more.",
        ),
    ] = 1_000
    assign_s: Annotated[
        float,
        Meta(
            ge=0.0,
            le=86_400.0,
            description="Seconds between two regroupings of the agents into clusters by the cloud. Agents need it "
            "too, to send profiles. 0: never.",
        ),
    ] = 0.0
    silence_s: Annotated[
        float,
        Meta(gt=0.0, le=1e9, description="Seconds of silence after which a member's contribution is forgotten."),
    ] = 604_800.0


class Telemetry(Section, frozen=True):
    """Logs, metrics and journals."""

    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], Meta(description="Lowest level of the records that are logged.")
    ] = "INFO"
    log_format: Annotated[
        Literal["lines", "json"],
        Meta(
            description="How a record is logged: as lines for people, or as JSON, one object a line with time, level, party, "
            "logger and message, and the traceback of an error."
        ),
    ] = "lines"
    metrics_host: Annotated[
        str,
        Meta(min_length=1, description="Address on which metrics are served to Prometheus, if `metrics_port` is set."),
    ] = "127.0.0.1"
    metrics_port: Annotated[Port, Meta(description="TCP port of the metrics. 0: none are served.")] = 0
    report_s: Annotated[
        float,
        Meta(
            ge=0.0,
            le=3_600.0,
            description="Seconds between two reports of an agent's metrics to its edge, which serves them with its own. "
            "0: it reports nothing. Shorter shows more and costs about 2 KB each time.",
        ),
    ] = 0.0
    opentelemetry: Annotated[
        bool,
        Meta(
            description="Whether a part exports spans of requests by OpenTelemetry, as the OTEL_ variables of its "
            "environment say (docs/opentelemetry.md). It needs pip install 'fedhlm[otel]'."
        ),
    ] = False
    journal: Annotated[
        bool,
        Meta(
            description="Whether a part publishes its inputs and decisions, so that a recording of the bus can be "
            "replayed through the code (fedhlm replay --check). Its traffic more than doubles."
        ),
    ] = False


class Config(Section, frozen=True):
    """Every setting of agents, edges and clouds."""

    preset: Annotated[
        str,
        Meta(
            min_length=1,
            description="Name of a shipped preset, or path of a preset file. Its settings override the defaults only.",
        ),
    ] = DEFAULT_PRESET
    broker: Broker = Broker()
    cluster: Cluster = Cluster()
    agent: Agent = Agent()
    edge: Edge = Edge()
    cloud: Cloud = Cloud()
    generation: Generation = Generation()
    federation: Federation = Federation()
    telemetry: Telemetry = Telemetry()
    api: Api = Api()
    home_assistant: HomeAssistant = HomeAssistant()
    a2a: A2a = A2a()
