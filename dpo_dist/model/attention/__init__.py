"""Attention over packed sequences: kernels, and sequence parallelism."""
