"""Ask a model for responses."""
