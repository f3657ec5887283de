"""Losses, log-probs and metrics: pure tensor functions without I/O and collective calls."""
