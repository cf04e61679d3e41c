"""Helpers for parts in containers: health checks, and certificates for all containers of a machine."""
