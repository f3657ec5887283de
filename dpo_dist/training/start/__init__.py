"""The start of a run: checks, joined processes, run directory, and inputs before weights are loaded."""
