"""What people look at: metrics on disk, curves, the report page, Weights & Biases."""
