"""The doctor's report: page and terminal."""
