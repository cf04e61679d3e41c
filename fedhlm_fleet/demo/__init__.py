"""The demo: a fleet on this machine, its requests, its figures, and the texts for comparison."""
