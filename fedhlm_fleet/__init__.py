"""Operators' tools and the `fedhlm` command."""
