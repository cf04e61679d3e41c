"""Chaos tests: faults are injected into a fleet of real processes and a real mosquitto, and every answer is checked."""
