"""Estimate memory and hours of a run on GPUs that you do not have."""
