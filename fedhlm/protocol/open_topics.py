"""Topics for programs of other houses, which carry JSON or plain text: the second half of the table of topics.

Parts use them only where a key of the settings turns them on. Access control files and the page of the protocol are
derived from OPEN_TABLE as they are from `topics.TABLE`.
"""

import re
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import msgspec

from fedhlm.protocol.roles import Role
from fedhlm.protocol.topics import DEFAULT_ROOT, TopicRow, table_of

_OUTSIDE: Final = re.compile(r"[^A-Za-z0-9-]")


class OpenTopic(NamedTuple):
    """One row of OPEN_TABLE. `{device}` is `device_of` a party's name; `rooted` says that the topic is under the root.

    `{org}` is `a2a.org`, and `{suffix}` a level that the client chooses.

    All these topics are on the broker of a cluster. `payload` says in words what they carry.
    """

    pattern: str
    payload: str
    qos: Literal[0, 1]
    retain: bool
    publishers: tuple[Role, ...]
    subscribers: tuple[Role, ...]
    purpose: str
    rooted: bool = True
    open_only: bool = False

    def name(self, root: str = DEFAULT_ROOT, **levels: str) -> str:
        """Return the full topic name, or a filter when a level is given as ``+``."""
        name = self.pattern.format(**levels)
        return f"{root}/{name}" if self.rooted else name


def device_of(name: str) -> str:
    """The id of a party's device at Home Assistant, which knows letters, digits, '-' and '_' only. No two are alike."""
    return "fedhlm-" + _OUTSIDE.sub(lambda found: f"_{ord(found[0]):02x}", name)


def as_json(payload: Mapping[str, object]) -> bytes:
    """The bytes of a JSON payload. Numbers that JSON does not know become null."""
    return msgspec.json.encode(payload)


HOME_DEVICE: Final = OpenTopic(
    pattern="homeassistant/device/{device}/config",
    payload="JSON",
    qos=1,
    retain=True,
    publishers=("agent", "edge"),
    subscribers=("client",),
    purpose="a part as a device of Home Assistant, with its entities",
    rooted=False,
)
HOME_AGENT_AVAILABLE: Final = OpenTopic(
    pattern="c/{cluster}/a/{agent}/home/available",
    payload="`online` or `offline`",
    qos=1,
    retain=True,
    publishers=("agent", "edge"),
    subscribers=("client",),
    purpose="whether an agent is there: its own word, and the edge's when its presence changes",
)
HOME_AGENT_VALUES: Final = OpenTopic(
    pattern="c/{cluster}/a/{agent}/home/values",
    payload="JSON",
    qos=0,
    retain=False,
    publishers=("agent",),
    subscribers=("client",),
    purpose="the figures of an agent for its sensors",
)
HOME_ASK: Final = OpenTopic(
    pattern="c/{cluster}/a/{agent}/from/{client}/ask",
    payload="text",
    qos=1,
    retain=False,
    publishers=("client",),
    subscribers=("agent",),
    purpose="a text to continue, from the client that `home_assistant.client` names",
)
HOME_ANSWER: Final = OpenTopic(
    pattern="c/{cluster}/a/{agent}/to/{client}/answer",
    payload="JSON",
    qos=1,
    retain=False,
    publishers=("agent",),
    subscribers=("client",),
    purpose="the last text that was asked, and its continuation, for the client that asked",
)
HOME_EDGE_AVAILABLE: Final = OpenTopic(
    pattern="c/{cluster}/home/available",
    payload="`online` or `offline`",
    qos=1,
    retain=True,
    publishers=("edge",),
    subscribers=("client",),
    purpose="whether the edge is there, by its own word",
)
HOME_EDGE_VALUES: Final = OpenTopic(
    pattern="c/{cluster}/home/values",
    payload="JSON",
    qos=0,
    retain=False,
    publishers=("edge",),
    subscribers=("client",),
    purpose="the figures of an edge for its sensors",
)

A2A_CARD: Final = OpenTopic(
    pattern="$a2a/v1/discovery/{org}/{cluster}/{agent}",
    payload="JSON",
    qos=1,
    retain=True,
    publishers=("agent", "edge"),
    subscribers=("client", "edge"),
    purpose="the card of an agent, with its status: its own word, and the edge's when its presence changes",
    rooted=False,
)
A2A_REQUEST: Final = OpenTopic(
    pattern="$a2a/v1/request/{org}/{cluster}/{agent}",
    payload="JSON",
    qos=1,
    retain=False,
    publishers=("client",),
    subscribers=("agent",),
    purpose="a request of JSON-RPC, with a Response Topic of the next row and Correlation Data",
    rooted=False,
)
A2A_REPLY: Final = OpenTopic(
    pattern="$a2a/v1/reply/{org}/{cluster}/{client}/{suffix}",
    payload="JSON",
    qos=1,
    retain=False,
    publishers=("agent",),
    subscribers=("client",),
    purpose="the answers to a client's requests, with the Correlation Data of each; the client chooses the suffix",
    rooted=False,
)

OPEN_TABLE: Final = (
    HOME_DEVICE,
    HOME_AGENT_AVAILABLE,
    HOME_AGENT_VALUES,
    HOME_ASK,
    HOME_ANSWER,
    HOME_EDGE_AVAILABLE,
    HOME_EDGE_VALUES,
    A2A_CARD,
    A2A_REQUEST,
    A2A_REPLY,
)


def markdown() -> str:
    """Return the table as Markdown, as shown in docs/protocol.md."""
    return table_of(
        "topic",
        (
            TopicRow(
                f"{'ROOT/' * t.rooted}{t.pattern}", t.payload, t.qos, t.retain, t.publishers, t.subscribers, t.purpose
            )
            for t in OPEN_TABLE
        ),
    )
