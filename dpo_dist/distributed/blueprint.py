"""Models as their configs make them, without memory for weights."""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights


def blueprint(kind: type[Any], config: Any) -> Any:
    """Return a model of a class: its buffers are computed, its weights have no values."""
    before = torch.get_default_dtype()
    try:
        # transformers also computes buffers in the type of the weights, which peft writes as a text.
        torch.set_default_dtype(getattr(torch, str(config.dtype).removeprefix("torch."), before))
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            return kind(copy.deepcopy(config))
    finally:
        torch.set_default_dtype(before)
