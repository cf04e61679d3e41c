"""What travels on the bus: messages, topics, fingerprints."""
