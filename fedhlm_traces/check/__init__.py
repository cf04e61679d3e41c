"""Recorded decisions made again: the same inputs to the code of today, and what it decides otherwise."""
