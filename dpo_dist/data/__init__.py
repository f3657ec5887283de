"""Preference data: records of files, encoded examples, micro-batches of a step."""
