"""Replay recorded decisions through today's code and compare the results."""
