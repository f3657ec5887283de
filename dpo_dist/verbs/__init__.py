"""The verbs of a run beside `train`: precompute, evaluate, export, store, launch."""
