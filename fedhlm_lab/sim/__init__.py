"""The simulator: whole fleets in virtual time."""
