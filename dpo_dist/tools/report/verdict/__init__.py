"""Judge a run by its metrics, summary and data."""
