"""The cloud: settles escalated blocks with the large model."""
