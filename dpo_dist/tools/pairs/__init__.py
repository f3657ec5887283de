"""Make preference records."""
