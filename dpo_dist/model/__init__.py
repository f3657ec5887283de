"""Weights and the packed forward pass."""
