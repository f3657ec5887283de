"""Evaluation of a model on pairs: intervals, calibration, files of results."""
