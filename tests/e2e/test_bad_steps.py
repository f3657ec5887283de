"""A step whose loss is not finite on one rank is skipped on all, named, and counted; too many end the run."""

import json
from pathlib import Path

from tests.e2e.conftest import Overrides
from tests.support.launch import history, run_verb, summary, train

SPOILING = '''
import torch
from torch.nn.functional import logsigmoid

from dpo_dist.objective.losses import scaled_margin

calls = 0


def spoiled(policy, reference, config, facts):
    """The sigmoid loss; its third call in a graph is not finite on rank 1."""
    global calls
    import os

    losses = -logsigmoid(scaled_margin(policy, reference, config))
    if policy.chosen.requires_grad and len(losses) and not facts is None:
        calls += 1
        if calls in NUMBERS and os.environ.get("RANK") == "1":
            losses = losses + torch.inf
    return losses
'''
