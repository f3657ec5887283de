"""The model: its files, its weights and its packed forward pass."""
