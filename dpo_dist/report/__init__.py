"""Reports of a run: console, metrics on disk, curves, the report page, Weights & Biases."""
