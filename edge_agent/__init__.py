"""The agent: drafts tokens with the SLM, has doubtful drafts verified, and commits the text."""
