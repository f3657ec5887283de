"""The steps of a run: the loop, one step, one evaluation, and the progress that a checkpoint has."""
