"""The coins that an agent tosses for a whole text. Both come from one stream, at positions of their own."""

from fedhlm.decoding.sampling import AUDIT_STREAM, uniform


def audit_coin(seed: int) -> float:
    """The number in (0, 1) that decides whether the unverified tail of the seed's text is audited."""
    return uniform(seed, 0, AUDIT_STREAM)


def peers_coin(seed: int) -> float:
    """The number in (0, 1) that decides whether the seed's text asks peers although that has not paid lately."""
    return uniform(seed, 1, AUDIT_STREAM)
