"""What an agent knows from its peers, and whether asking them pays (docs/algorithms.md, 5).

Asking peers takes no message: their keys, and the tokens that the cloud settled, have arrived by subscription.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Final

from edge_agent.events import Drafted, Observation, Proposal
from fedhlm import choices
from fedhlm.errors import ProtocolError
from fedhlm.peers.collaboration import Collaboration, Prices
from fedhlm.peers.context_keys import DIMS, unpack_key
from fedhlm.peers.neighbours import Centroid, Match, Memory
from fedhlm.protocol.messages import UncertainTokens, VerifiedTokens
from fedhlm.settings import Generation

EXPLORED_SHARE: Final = 1 / 32


class Peers:
    """One agent's view of its cluster.

    `clock_s` is monotonic, in seconds; `space` names the space of its context keys.
    """

    def __init__(
        self, name: str, clock_s: Callable[[], float], *, size: int, max_age_s: float, space: str = ""
    ) -> None:
        self.name = name
        self.space = space
        self.memory = Memory(size, DIMS)
        self.centroid = Centroid(clock_s, max_age_s=max_age_s)
        self.collaboration: defaultdict[str, Collaboration] = defaultdict(Collaboration)

    def _check(self, space: str) -> None:
        if space != self.space:
            raise ProtocolError(f"message.space must be {self.space!r}, or keys cannot be compared (got {space!r})")

    def hear_doubts(self, message: UncertainTokens) -> None:
        """Add the doubtful drafts of another agent, or of this one.

        Raises:
            ProtocolError: a key has the wrong length, or belongs to another model.
        """
        self._check(message.space)
        keys = [unpack_key(item.key) for item in message.items]
        if keys:
            self.centroid.add(message.sender, *keys)

    def hear_verified(self, message: VerifiedTokens) -> None:
        """Add tokens that the cloud verified in this cluster.

        Raises:
            ProtocolError: a key has the wrong length, or belongs to another model.
        """
        self._check(message.space)
        for key, token in [(unpack_key(item.key), item.token) for item in message.items]:
            self.memory.add(key, token, "peer")

    def asks(self, config: Generation, coin: float) -> bool:
        """Whether publishing doubts pays now, by measured bytes (FedHLM, equation 13, with a term for wrong hits).

        `coin` is uniform in [0, 1]. One generation in a few publishes anyway, because a cluster that stopped could not
        find out that it pays again.
        """
        if not choices.PEERS[config.peers].asked:
            return False
        learning, consensus = config.learning, config.consensus
        known = self.collaboration[config.peers]
        # A round trip is priced in bytes, which are added to those of an escalated token.
        escalated = known.llm_bytes
        saved = 1.0 if not escalated else (escalated + learning.round_trip_bytes) / escalated
        prices = Prices(consensus.lan_price, saved, learning.harm_bytes)
        return coin < EXPLORED_SHARE or known.asks(prices)

    def consult(self, config: Generation, similarity: float | None) -> Callable[[Drafted], Proposal | None]:
        """Return the `consult` function of a plan.

        Peers settle a draft that they agree with from `similarity` on (None: never).

        If the gate keeps nothing unverified, or the peers know another token, a proposal is only a better draft. In
        measurements an agreeing neighbour was right far more often than one that would replace the draft. While no
        similarity is known to be safe, hits are counted at the configured one.
        """
        look = RULES[config.peers]
        consensus = config.consensus
        settles = not choices.GATES[config.gate].verifies_all
        adopts = similarity is not None
        theta = consensus.similarity if similarity is None else similarity
        known = self.collaboration[config.peers]

        def ask(draft: Drafted) -> Proposal | None:
            match = look(self, draft, consensus.votes, theta) if draft.key else None
            agrees = match is not None and match.token == draft.token
            hit = match is not None and agrees and match.similarity >= theta
            known.looked_up(hit=hit)
            if match is None:
                return None
            if not agrees:
                return Proposal(match.token, 1.0, match.similarity >= consensus.replace, None)
            score = min(1.0, max(0.0, 1.0 - match.similarity))
            return Proposal(match.token, score, hit and adopts, match.origin if settles else None)

        return ask if choices.PEERS[config.peers].asked else _nobody

    def learn(self, config: Generation, seen: Observation, similarity: float | None) -> None:
        """Learn whether a hit was right, no matter whether it was used or only counted."""
        theta = config.consensus.similarity if similarity is None else similarity
        if seen.match is not None and seen.match[0] <= 1.0 - theta:
            self.collaboration[config.peers].audited(wrong=seen.match[1] > 0.0)


def _nobody(_draft: Drafted) -> Proposal | None:
    return None


def _none(_peers: Peers, _draft: Drafted, _votes: int, _theta: float) -> Match | None:
    return None


def _centroid(peers: Peers, draft: Drafted, _votes: int, _theta: float) -> Match | None:
    """Accept the draft if its key is near the centroid of the other agents' keys (FedHLM, equations 9 and 10)."""
    similarity = peers.centroid.similarity(peers.name, unpack_key(draft.key))
    return None if similarity is None else Match(draft.token, similarity, "peer")


def _neighbour(peers: Peers, draft: Drafted, votes: int, theta: float) -> Match | None:
    """The token that the cloud settled in the nearest known contexts, if they agree."""
    return peers.memory.nearest(unpack_key(draft.key), votes, theta=theta)


RULES: Final[dict[str, Callable[[Peers, Drafted, int, float], Match | None]]] = {
    "none": _none,
    "centroid": _centroid,
    "neighbour": _neighbour,
}
