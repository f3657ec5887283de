"""Attention over packed pairs: the kernels, and tokens shared by ranks."""
