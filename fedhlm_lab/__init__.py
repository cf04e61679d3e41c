"""Research: the simulator and the studies."""
