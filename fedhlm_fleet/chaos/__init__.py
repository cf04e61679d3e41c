"""Live chaos: a fleet of real processes over a real mosquitto, broken on purpose and judged from the outside."""
