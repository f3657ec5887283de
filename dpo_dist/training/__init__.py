"""One step, the loop over steps, and the start and end of a run."""
