"""Comparison of models: responses to the same prompts, scores, win rates, KL, style."""
