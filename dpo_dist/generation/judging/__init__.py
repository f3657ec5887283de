"""Scores of responses: reward model, function, endpoint."""
