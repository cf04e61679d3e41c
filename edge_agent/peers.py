"""What an agent knows from its peers, and whether asking them pays (docs/algorithms.md, 5).

Peers are asked without a message: their keys and the tokens that the cloud settled have come by subscription before.
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
    """One agent's view of its cluster. `clock_s` is monotonic; `space` names what keys are made with."""

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
        """Another agent's, or this one's, doubted drafts.

        Raises:
            ProtocolError: a key of the wrong length, or made with another model.
        """
        self._check(message.space)
        keys = [unpack_key(item.key) for item in message.items]
        if keys:
            self.centroid.add(message.sender, *keys)

    def hear_verified(self, message: VerifiedTokens) -> None:
        """What the cloud settled in this cluster.

        Raises:
            ProtocolError: a key of the wrong length, or made with another model.
        """
        self._check(message.space)
        for key, token in [(unpack_key(item.key), item.token) for item in message.items]:
            self.memory.add(key, token, "peer")

    def asks(self, config: Generation, coin: float) -> bool:
        """Whether publishing doubts pays now, by measured bytes (FedHLM [13] with the wrong-hit term).

        `coin` in [0, 1]: one generation in a few publishes anyway, else a cluster that gave up would never learn better.
        """
        if not choices.PEERS[config.peers].asked:
            return False
        learning, consensus = config.learning, config.consensus
        known = self.collaboration[config.peers]
        # A round trip is worth bytes; they are added to those of an escalated token.
        escalated = known.llm_bytes
        saved = 1.0 if not escalated else (escalated + learning.round_trip_bytes) / escalated
        prices = Prices(consensus.lan_price, saved, learning.harm_bytes)
        return coin < EXPLORED_SHARE or known.asks(prices)

    def consult(self, config: Generation, similarity: float | None) -> Callable[[Drafted], Proposal | None]:
        """A plan's `consult`: peers settle a draft that they agree with from `similarity` on (None: never).

        Where the gate keeps nothing unverified, or they know another token, a proposal is a better draft and no more:
        measured, an agreeing neighbour is right far more often than one that would replace the draft. Hits are counted
        at the configured similarity while there is none that is known to be safe.
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
        """What the target said of a hit, whether it was used or only counted."""
        theta = config.consensus.similarity if similarity is None else similarity
        if seen.match is not None and seen.match[0] <= 1.0 - theta:
            self.collaboration[config.peers].audited(wrong=seen.match[1] > 0.0)


def _nobody(_draft: Drafted) -> Proposal | None:
    return None


def _none(_peers: Peers, _draft: Drafted, _votes: int, _theta: float) -> Match | None:
    return None


def _centroid(peers: Peers, draft: Drafted, _votes: int, _theta: float) -> Match | None:
    """The draft stands where its key is near the centroid of the other agents' (FedHLM eqs 9-10)."""
    similarity = peers.centroid.similarity(peers.name, unpack_key(draft.key))
    return None if similarity is None else Match(draft.token, similarity, "peer")


def _neighbour(peers: Peers, draft: Drafted, votes: int, theta: float) -> Match | None:
    """The token that the cloud settled in the nearest known contexts, where they agree."""
    return peers.memory.nearest(unpack_key(draft.key), votes, theta=theta)


RULES: Final[dict[str, Callable[[Peers, Drafted, int, float], Match | None]]] = {
    "none": _none,
    "centroid": _centroid,
    "neighbour": _neighbour,
}
