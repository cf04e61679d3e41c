"""What is learnt from verdicts: curves, thresholds, the error budget, and the federation that pools them."""
