"""Recordings of the bus: file format, recording, replay, statistics, stories and checks."""
