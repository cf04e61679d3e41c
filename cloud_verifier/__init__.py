"""The cloud: verifies escalated blocks with the LLM."""
