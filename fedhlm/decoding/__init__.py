"""Decoding: model inference, sampling, doubt, and the couplings between the laws of draft and target."""
