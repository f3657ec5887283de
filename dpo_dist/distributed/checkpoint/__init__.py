"""Checkpoints: what each rank saves, and what is read back on any number of ranks."""
