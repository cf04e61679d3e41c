"""A model's next-token law, and how the laws of two models are coupled."""
