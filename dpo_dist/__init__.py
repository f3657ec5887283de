"""Distributed DPO training: a ZeRO-3 policy and stored reference log-probs.

Verbs are run as `dpo-dist train`. The API for scripts and notebooks is `from dpo_dist import api`
(docs/python.md). Importing this package alone imports no torch.
"""

__version__ = "0.1.0"
