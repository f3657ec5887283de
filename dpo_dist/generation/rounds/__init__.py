"""Rounds of sampling, scoring and training."""
