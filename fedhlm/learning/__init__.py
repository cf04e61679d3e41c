"""Learning from verdicts: curves, thresholds, the certificate of the error budget, and the federation."""
