"""Where logits come from: one module per runtime."""
