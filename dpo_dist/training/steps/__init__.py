"""The steps of a run: the loop, one step, one evaluation, and what a checkpoint has of them."""
