"""The papers' tables and figures, from cached laws of a pair of models and the live system's own rules."""
