"""The encoded data on disk: built once, opened by each run."""
