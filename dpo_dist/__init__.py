"""Distributed DPO training: ZeRO-3 policy, offloaded reference, stored log-probs."""

__version__ = "0.1.0"
