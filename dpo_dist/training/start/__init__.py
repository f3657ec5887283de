"""The start of a run: checks, joining processes, the run directory, and inputs except weights."""
