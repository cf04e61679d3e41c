"""mosquitto's access control file, judged by an independent reading of its manual; and what the topic table says in plain words."""

from typing import Literal, NamedTuple

from fedhlm.protocol.open_topics import A2A_CARD, A2A_REPLY, A2A_REQUEST, HOME_DEVICE, OpenTopic, device_of
from fedhlm.protocol.topics import ASSIGN, CANCEL, CLIENT_STATUS, NEIGHBOUR, PEER, PROMPT, Topic

Access = Literal["read", "write"]
Where = Literal["cluster", "cloud", "shared"]


class Who(NamedTuple):
    role: str
    name: str
    clusters: tuple[str, ...] = ()


def matches(pattern: str, topic: str) -> bool:
    """Whether a filter covers a topic name, level by level."""
    levels, wanted = topic.split("/"), pattern.split("/")
    if wanted[-1] == "#":
        wanted = wanted[:-1]
        levels = levels[: len(wanted)] if len(levels) >= len(wanted) else levels
    return len(levels) == len(wanted) and all(w in ("+", level) for w, level in zip(wanted, levels, strict=True))


def allows(acl: str, user: str, access: Access, topic: str) -> bool:
    """Whether the file lets a named user read or write a topic: some line of its block must say so."""
    block = None
    for line in acl.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word in ("", "#"):
            continue
        if word == "user":
            block = rest
        elif word == "topic":
            granted, _, pattern = rest.partition(" ")
            assert granted in ("read", "write"), line
            if block == user and granted == access and matches(pattern, topic):
                return True
        else:
            raise AssertionError(f"not understood: {line}")
    return False


def expected(
    who: Who, access: Access, topic: Topic | OpenTopic, levels: dict[str, str], where: Where, home: str = ""
) -> bool:
    """What the table and the rules of the house say: each row, each role, by name."""
    cluster, agent = levels.get("cluster"), levels.get("agent")
    if who.role == "observer":
        return access == "read" and not (isinstance(topic, OpenTopic) and not topic.rooted)
    if who.role not in (topic.publishers if access == "write" else topic.subscribers):
        return False
    if topic is HOME_DEVICE:
        return _device_expected(who, access, levels["device"], where, home)
    inside = topic.pattern.startswith("c/") or topic in (A2A_CARD, A2A_REQUEST, A2A_REPLY)
    if where == "cluster" and not (topic in (ASSIGN, CLIENT_STATUS) or (inside and cluster == home)):
        return False
    if where == "cluster" and who.role in ("agent", "edge", "client") and who.clusters and home not in who.clusters:
        return False
    if access == "write" and topic in (PROMPT, CANCEL):  # nobody could tell who sent it
        return False
    if where == "cloud" and inside:
        return False
    if topic is ASSIGN and access == "write":
        return who.role == ("edge" if where == "cluster" else "cloud")
    match who.role:
        case "cloud":
            return where != "cluster"
        case "client" | "operator":
            near = not who.clusters or cluster is None or cluster in who.clusters
            return near and levels.get("client") in (None, who.name)
        case "edge":
            return cluster in (None, *who.clusters) or (topic is NEIGHBOUR and access == "read")
        case _:
            mine = agent in (None, who.name) or (topic is PEER and access == "read")
            return where != "cloud" and cluster in (None, *who.clusters) and mine


def _device_expected(who: Who, access: Access, device: str, where: Where, home: str) -> bool:
    near = where == "shared" or (where == "cluster" and (not who.clusters or home in who.clusters))
    return near and (access == "read" or device == device_of(who.name))
