"""Examine the data of a run."""
