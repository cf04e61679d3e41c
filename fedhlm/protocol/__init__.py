"""The protocol of the bus: messages, topics, fingerprints."""
