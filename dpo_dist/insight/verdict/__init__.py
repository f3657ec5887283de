"""The verdict about a run, by rules over its metrics."""
