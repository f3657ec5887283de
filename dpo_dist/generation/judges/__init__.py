"""Judges of responses: reward model, function, endpoint."""
