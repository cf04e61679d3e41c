"""The topics that an edge handles: those of its agents, and those from the other sides."""

from typing import Final

from fedhlm.protocol import topics

BELOW: Final = (
    topics.ESCALATE,
    topics.AGENT_STATUS,
    topics.PEER,
    topics.FL_UPDATE,
    topics.PROFILE,
    topics.AGENT_METRICS,
)
HEARD: Final = (
    *BELOW,
    topics.FL_STATE,
    topics.CLOUD_STATUS,
    topics.CLOUD_VERDICT,
    topics.CLOUD_FL_STATE,
    topics.NEIGHBOUR,
    topics.ASSIGN,
    topics.FORGET,
)
