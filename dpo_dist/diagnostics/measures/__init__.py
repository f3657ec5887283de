"""Measurements of records, made in worker processes."""
