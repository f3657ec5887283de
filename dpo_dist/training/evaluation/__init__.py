"""Scores of pairs by trained models, and how sure the means are."""
