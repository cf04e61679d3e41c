"""What computes the logits of an `Engine`."""
