"""The roles of parties, as topics and presences name them, and the properties of each.

Code that depends on a property of a role looks it up here and compares no names.
"""

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

PartRole = Literal["agent", "edge", "cloud"]
Role = Literal[PartRole, "client", "operator"]
PARTS: Final[tuple[PartRole, ...]] = ("agent", "edge", "cloud")
EDGE_PREFIX: Final = "edge-"  # an edge is named after its cluster


class RoleTraits(NamedTuple):
    """Properties of a role.

    Attributes:
        level: the level of topics that is the party's own name, if there is one.
        proper: the only name that such a party may have, `{cluster}` being its cluster; empty if names are free.
        order: its place in lists, from the cloud outwards.
        drafts: it answers prompts and drafts their tokens.
        relays: it stands between the agents of a cluster and the cloud.
        verifies: it settles drafts with the LLM.
        asks: it sends prompts and reads the outputs.
    """

    level: str = ""
    proper: str = ""
    order: int = 0
    drafts: bool = False
    relays: bool = False
    verifies: bool = False
    asks: bool = False


ROLES: Final[dict[str, RoleTraits]] = {
    "agent": RoleTraits(level="agent", order=2, drafts=True),
    "edge": RoleTraits(proper=f"{EDGE_PREFIX}{{cluster}}", order=1, relays=True),
    "cloud": RoleTraits(proper="cloud", order=0, verifies=True),
    "client": RoleTraits(level="client", order=3, asks=True),
    "operator": RoleTraits(order=4),
}


def edge_name(cluster: str) -> str:
    """Return the name of a cluster's edge in messages and certificates."""
    return f"{EDGE_PREFIX}{cluster}"


def cluster_of(name: str) -> str | None:
    """Return the cluster of the edge of this name; None if the name is no edge's."""
    return name.removeprefix(EDGE_PREFIX) if name.startswith(EDGE_PREFIX) else None


def reserved(name: str) -> bool:
    """Whether a name can only be that of a cloud or of an edge."""
    return any(
        name.startswith(role.proper.partition("{")[0]) if "{" in role.proper else name == role.proper
        for role in ROLES.values()
        if role.proper
    )


def traits_of(roles: Iterable[Role]) -> list[RoleTraits]:
    """Look up several roles, such as a topic's publishers."""
    return [ROLES[role] for role in roles]
