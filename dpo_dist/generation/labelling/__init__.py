"""Comparisons by people on a local web page."""
