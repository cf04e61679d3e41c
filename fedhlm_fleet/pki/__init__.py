"""Certificates of a fleet: a certificate authority in a folder, and brokers that trust exactly what it issued."""
