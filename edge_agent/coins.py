"""The coins that an agent tosses for a whole text. Both come from one stream, at positions of their own.

They follow from the session, a random number of the agent's own. Whoever asks chooses the seed, and many use the same
one for all texts: with coins of the seed, all of these texts would be audited, or none.
"""

from fedhlm.decoding.sampling import AUDIT_STREAM, uniform


def audit_coin(session: int) -> float:
    """The number in (0, 1) that decides whether the unverified tail of the session's text is audited."""
    return uniform(session, 0, AUDIT_STREAM)


def peers_coin(session: int) -> float:
    """The number in (0, 1) that decides whether the session's text asks peers although that has not paid lately."""
    return uniform(session, 1, AUDIT_STREAM)
