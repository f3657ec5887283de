"""Checkpoints: each rank saves its slices, and any number of ranks can load them."""
