"""The backends that compute logits: one module per runtime."""
