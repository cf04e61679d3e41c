"""The device: drafts tokens, doubts them, asks, and commits."""
