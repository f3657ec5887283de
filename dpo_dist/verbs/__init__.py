"""The verbs of a run other than `train`: precompute, evaluate, export, store, launch."""
