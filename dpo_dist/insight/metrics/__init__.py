"""Metrics of a run: their log, trackers, model card."""
