"""The table of topics: payload, QoS, retain flag, publishers and subscribers of each.

Names, subscription filters, access control files and the table in the documentation are all derived from TABLE.
"""

import re
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

import msgspec

from fedhlm.errors import ProtocolError
from fedhlm.protocol import codec, fields, messages
from fedhlm.protocol.roles import ROLES, Role

DEFAULT_ROOT: Final = "fedhlm/1"


class _AnyLevel(dict[str, str]):
    def __missing__(self, _level: str) -> str:
        return "+"


class Topic(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table.

    `{cluster}`, `{agent}`, `{client}` and `{member}` in `pattern` stand for one level each. `open_only`: the topic does
    not say who sends, so a broker with access rules lets nobody publish on it.
    """

    pattern: str
    payload: type[messages.AnyMessage]
    qos: Literal[0, 1]
    retain: bool
    publishers: tuple[Role, ...]
    subscribers: tuple[Role, ...]
    purpose: str
    open_only: bool = False

    def name(self, root: str = DEFAULT_ROOT, **levels: str) -> str:
        """Return the full topic name, or a filter when a level is given as ``+``."""
        return f"{root}/{self.pattern.format(**levels)}"

    def filter(self, root: str = DEFAULT_ROOT, **levels: str) -> str:
        """Return a filter in which every level that is not given is ``+``."""
        return f"{root}/{self.pattern.format_map(_AnyLevel(levels))}"

    def parse(self, name: str, root: str = DEFAULT_ROOT) -> dict[str, str] | None:
        """Return the levels of a full topic name; None when it does not match this row."""
        if not name.startswith(f"{root}/"):
            return None
        matched = self._regex.fullmatch(name, len(root) + 1)
        return matched.groupdict() if matched else None

    @property
    def sender_level(self) -> str:
        """The level that must be the sender's name; empty when no level is, or when several roles publish."""
        levels = [ROLES[role].level for role in self.publishers]
        return levels[0] if len(levels) == 1 and f"{{{levels[0]}}}" in self.pattern else ""

    @property
    def _regex(self) -> re.Pattern[str]:
        return _regex_of(self.pattern)


_REGEXES: Final[dict[str, re.Pattern[str]]] = {}


def _regex_of(pattern: str) -> re.Pattern[str]:
    if pattern not in _REGEXES:
        # A level must be a valid party name, so that no hostile text reaches a file name or a log.
        _REGEXES[pattern] = re.compile(re.sub(r"\{(\w+)\}", rf"(?P<\1>{fields.NAME_PATTERN})", pattern))
    return _REGEXES[pattern]


AGENT_STATUS: Final = Topic(
    pattern="c/{cluster}/a/{agent}/status",
    payload=messages.Presence,
    qos=1,
    retain=True,
    publishers=("agent",),
    subscribers=("edge", "client"),
    purpose="presence of an agent (last will)",
)
PROMPT: Final = Topic(
    pattern="c/{cluster}/a/{agent}/prompt",
    payload=messages.Prompt,
    qos=1,
    retain=False,
    publishers=("client",),
    subscribers=("agent",),
    purpose="a request for a generation, on a broker without access rules",
    open_only=True,
)
PROMPT_FROM: Final = Topic(
    pattern="c/{cluster}/a/{agent}/from/{client}/prompt",
    payload=messages.Prompt,
    qos=1,
    retain=False,
    publishers=("client",),
    subscribers=("agent",),
    purpose="a request for a generation; its sender is the client of the topic",
)
OUTPUT: Final = Topic(
    pattern="c/{cluster}/a/{agent}/to/{client}/output",
    payload=messages.Output,
    qos=1,
    retain=False,
    publishers=("agent",),
    subscribers=("client",),
    purpose="committed tokens with their sources, for the sender of the prompt",
)
CANCEL: Final = Topic(
    pattern="c/{cluster}/a/{agent}/cancel",
    payload=messages.Cancel,
    qos=1,
    retain=False,
    publishers=("client",),
    subscribers=("agent",),
    purpose="the cancellation of a request, on a broker without access rules",
    open_only=True,
)
CANCEL_FROM: Final = Topic(
    pattern="c/{cluster}/a/{agent}/from/{client}/cancel",
    payload=messages.Cancel,
    qos=1,
    retain=False,
    publishers=("client",),
    subscribers=("agent",),
    purpose="the cancellation of a request; its sender is the client of the topic",
)
CLIENT_STATUS: Final = Topic(
    pattern="client/{client}/status",
    payload=messages.Presence,
    qos=1,
    retain=True,
    publishers=("client",),
    subscribers=("agent",),
    purpose="presence of a client (last will); when it goes offline, agents end its requests",
)
EDGE_STATUS: Final = Topic(
    pattern="c/{cluster}/status",
    payload=messages.Presence,
    qos=1,
    retain=True,
    publishers=("edge",),
    subscribers=("agent", "client"),
    purpose="presence of the cluster's edge, with the cloud's fingerprint",
)
ESCALATE: Final = Topic(
    pattern="c/{cluster}/escalate/{agent}",
    payload=messages.Escalation,
    qos=1,
    retain=False,
    publishers=("agent",),
    subscribers=("edge",),
    purpose="a block of drafts to be verified",
)
VERDICT: Final = Topic(
    pattern="c/{cluster}/a/{agent}/verdict",
    payload=messages.Verdict,
    qos=1,
    retain=False,
    publishers=("edge",),
    subscribers=("agent",),
    purpose="the answer to an escalation",
)
CLOUD_STATUS: Final = Topic(
    pattern="cloud/status",
    payload=messages.Presence,
    qos=1,
    retain=True,
    publishers=("cloud",),
    subscribers=("edge", "client"),
    purpose="presence and fingerprint of the cloud",
)
CLOUD_VERIFY: Final = Topic(
    pattern="cloud/verify/{cluster}",
    payload=messages.EscalationBatch,
    qos=1,
    retain=False,
    publishers=("edge",),
    subscribers=("cloud",),
    purpose="escalations of a cluster, batched",
)
CLOUD_VERDICT: Final = Topic(
    pattern="cloud/verdict/{cluster}",
    payload=messages.VerdictBatch,
    qos=1,
    retain=False,
    publishers=("cloud",),
    subscribers=("edge",),
    purpose="the cloud's answers to a cluster",
)

PEER: Final = Topic(
    pattern="c/{cluster}/peer/{agent}",
    payload=messages.UncertainTokens,
    qos=0,
    retain=False,
    publishers=("agent",),
    subscribers=("agent", "edge"),
    purpose="doubtful drafts of an agent, with their context keys",
)
KNOWN: Final = Topic(
    pattern="c/{cluster}/known",
    payload=messages.VerifiedTokens,
    qos=0,
    retain=False,
    publishers=("edge",),
    subscribers=("agent",),
    purpose="verified tokens by context key, for the agents' caches",
)
NEIGHBOUR: Final = Topic(
    pattern="neighbour/{cluster}",
    payload=messages.VerifiedTokens,
    qos=0,
    retain=False,
    publishers=("edge",),
    subscribers=("edge",),
    purpose="digest of a cluster's verified tokens for the other edges",
)
FL_UPDATE: Final = Topic(
    pattern="c/{cluster}/fl/{agent}",
    payload=messages.Contribution,
    qos=1,
    retain=False,
    publishers=("agent",),
    subscribers=("edge",),
    purpose="an agent's sums and threshold of a federated round",
)
FL_STATE: Final = Topic(
    pattern="c/{cluster}/fl",
    payload=messages.Learned,
    qos=1,
    retain=True,
    publishers=("edge",),
    subscribers=("agent", "edge", "client"),
    purpose="the curves and threshold that the cluster's agents use",
)
CLOUD_FL_UPDATE: Final = Topic(
    pattern="cloud/fl/{cluster}",
    payload=messages.Contribution,
    qos=1,
    retain=False,
    publishers=("edge",),
    subscribers=("cloud",),
    purpose="a cluster's sums and mean threshold",
)
CLOUD_FL_STATE: Final = Topic(
    pattern="cloud/fl",
    payload=messages.Learned,
    qos=1,
    retain=True,
    publishers=("cloud",),
    subscribers=("edge", "cloud", "client"),
    purpose="the global curves and threshold",
)
PROFILE: Final = Topic(
    pattern="c/{cluster}/profile/{agent}",
    payload=messages.Profile,
    qos=1,
    retain=False,
    publishers=("agent",),
    subscribers=("edge",),
    purpose="a sample of an agent's token keys, for clustering",
)
CLOUD_PROFILE: Final = Topic(
    pattern="cloud/profile/{cluster}",
    payload=messages.Profile,
    qos=1,
    retain=False,
    publishers=("edge",),
    subscribers=("cloud",),
    purpose="the same sample, relayed to the cloud",
)
ASSIGN: Final = Topic(
    pattern="cloud/assign/{agent}",
    payload=messages.Assignment,
    qos=1,
    retain=True,
    publishers=("cloud", "edge"),
    subscribers=("agent", "edge"),
    purpose="the cluster that an agent belongs to",
)

FORGET: Final = Topic(
    pattern="federation/forget/{member}",
    payload=messages.Forget,
    qos=1,
    retain=True,
    publishers=("operator",),
    subscribers=("edge", "cloud"),
    purpose="the order to drop what a member contributed; the member is an agent, or an edge with its cluster",
)
ROSTER: Final = Topic(
    pattern="federation/members/{cluster}",
    payload=messages.Roster,
    qos=1,
    retain=True,
    publishers=("edge",),
    subscribers=("operator",),
    purpose="the members of a cluster's federation",
)
CLOUD_ROSTER: Final = Topic(
    pattern="federation/clusters",
    payload=messages.Roster,
    qos=1,
    retain=True,
    publishers=("cloud",),
    subscribers=("operator",),
    purpose="the clusters of the cloud's federation",
)

AGENT_METRICS: Final = Topic(
    pattern="c/{cluster}/a/{agent}/metrics",
    payload=messages.MetricsReport,
    qos=0,
    retain=False,
    publishers=("agent",),
    subscribers=("edge", "client"),
    purpose="metrics of an agent, if `telemetry.report_s` is set",
)

AGENT_JOURNAL: Final = Topic(
    pattern="c/{cluster}/a/{agent}/journal",
    payload=messages.Journal,
    qos=1,
    retain=False,
    publishers=("agent",),
    subscribers=("client",),
    purpose="the journal of an agent, if `telemetry.journal` is on",
)
EDGE_JOURNAL: Final = Topic(
    pattern="c/{cluster}/journal",
    payload=messages.Journal,
    qos=1,
    retain=False,
    publishers=("edge",),
    subscribers=("client",),
    purpose="the journal of an edge",
)
CLOUD_JOURNAL: Final = Topic(
    pattern="cloud/journal",
    payload=messages.Journal,
    qos=1,
    retain=False,
    publishers=("cloud",),
    subscribers=("client",),
    purpose="the journal of the cloud",
)

TABLE: Final = (
    AGENT_STATUS,
    PROMPT,
    PROMPT_FROM,
    OUTPUT,
    CANCEL,
    CANCEL_FROM,
    CLIENT_STATUS,
    EDGE_STATUS,
    ESCALATE,
    VERDICT,
    CLOUD_STATUS,
    CLOUD_VERIFY,
    CLOUD_VERDICT,
    PEER,
    KNOWN,
    NEIGHBOUR,
    FL_UPDATE,
    FL_STATE,
    CLOUD_FL_UPDATE,
    CLOUD_FL_STATE,
    PROFILE,
    CLOUD_PROFILE,
    ASSIGN,
    FORGET,
    ROSTER,
    CLOUD_ROSTER,
    AGENT_METRICS,
    AGENT_JOURNAL,
    EDGE_JOURNAL,
    CLOUD_JOURNAL,
)


def lookup(name: str, root: str = DEFAULT_ROOT) -> tuple[Topic, dict[str, str]] | None:
    """Find the row and the levels of a full topic name; None when no row matches."""
    for topic in TABLE:
        levels = topic.parse(name, root)
        if levels is not None:
            return topic, levels
    return None


def decode_for(topic: Topic, payload: bytes) -> messages.AnyMessage:
    """Decode a payload and check that it has the topic's type.

    Raises:
        ProtocolError: the payload is not a message, or a message of another type.
    """
    message = codec.decode(payload)
    if type(message) is not topic.payload:
        raise ProtocolError(f"{topic.pattern} carries {topic.payload.__name__}, not {type(message).__name__}")
    return message


def check_sender(name: str, topic: Topic, levels: dict[str, str], message: messages.AnyMessage) -> None:
    """Check the sender of a message on the topic `name`.

    Raises:
        ProtocolError: the topic contains the name of another sender.
    """
    level = topic.sender_level
    if level and message.sender != levels[level]:
        raise ProtocolError(f"message.sender on {name} must be {levels[level]!r} (got {message.sender!r})")


class TopicRow(NamedTuple):
    """A line of a table of topics in docs/protocol.md."""

    name: str
    payload: str
    qos: int
    retain: bool
    publishers: tuple[Role, ...]
    subscribers: tuple[Role, ...]
    purpose: str


def table_of(first: str, rows: Iterable[TopicRow]) -> str:
    """Return a table of topics as Markdown. `first` is the heading of its first column."""
    lines = [f"| {first} | payload | QoS | retained | publishers | subscribers | purpose |", "|" + "---|" * 7]
    for row in rows:
        cells = (
            f"`{row.name}`",
            row.payload,
            str(row.qos),
            "yes" if row.retain else "no",
            ", ".join(row.publishers),
            ", ".join(row.subscribers),
            row.purpose,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown() -> str:
    """Return the table as Markdown, as shown in docs/protocol.md."""
    return table_of(
        "topic under the root",
        (
            TopicRow(t.pattern, t.payload.__name__, t.qos, t.retain, t.publishers, t.subscribers, t.purpose)
            for t in TABLE
        ),
    )
