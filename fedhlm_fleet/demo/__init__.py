"""The demo: a fleet on this machine, what it is asked, and what its figures are compared with."""
