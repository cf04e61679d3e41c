"""The process of a part: start and stop, the service manager, and state on disk."""
