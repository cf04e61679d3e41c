"""Research: the simulator, oracles, and comparisons."""
