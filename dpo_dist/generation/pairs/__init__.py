"""Preference pairs from scores, models or people; rounds of sampling and training."""
