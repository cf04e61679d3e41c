"""What the caches of all runtimes have in common."""


def is_cut(length: int, held: int) -> bool:
    """Whether a cache of `held` tokens loses some when it is cut to `length` tokens.

    Raises:
        ValueError: `length` is negative or more than the cache holds.
    """
    if not 0 <= length <= held:
        raise ValueError(f"cache cannot be cut to {length} tokens: it holds {held}")
    return length < held
