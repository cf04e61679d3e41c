"""Recordings of the bus: the file, recording, replaying, telling what happened, and deciding it all again."""
