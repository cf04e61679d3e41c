"""What to do where a part of a fleet is missing or does not reach another, as the doctor and the status say it."""

from typing import Final

UNLIKE: Final = (
    "give both sides models with one tokenizer, from one release, or set agent.target_tokenizer to the tokenizer of the "
    "cloud's model"
)


def offline(role: str) -> str:
    """What to do with a part that is offline."""
    return f"start it, or run `fedhlm doctor {role}` on its machine"


def cut_off(role: str) -> str:
    """What to do with a part that is online, but does not see the next one."""
    return f"run `fedhlm doctor {role}` on its machine"


def no_edge(cluster: str) -> str:
    """What to do where no edge of a cluster was ever seen."""
    return f"start the edge of cluster {cluster} (fedhlm edge), or correct cluster.name; nothing is verified meanwhile"
