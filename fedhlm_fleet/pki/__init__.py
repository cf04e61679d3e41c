"""Certificates of a fleet: an authority in a folder, what it issued, and brokers configured to trust exactly that."""
