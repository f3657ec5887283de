"""Weights that get a gradient from a log-prob, read from the graph of autograd without a backward."""

import torch
from torch import Tensor, nn

from dpo_dist.data.packing import Sequences
from dpo_dist.model.checked import CheckedModel
from dpo_dist.model.experts import expert_blocks
from dpo_dist.model.trial import pack_trial, trial_sequences
from dpo_dist.number_text import first_few

# Prompt and response of the short sequence: an input of two tokens.
_SHORT = (2, 1)


def sometimes_used(checked: CheckedModel) -> str:
    """Return in words the trained weights that some sequences use and others do not; empty: there are none.

    Without those of lists of experts, whose gradients are ready at once. Collective.
    """
    causal_lm = checked.model.causal_lm
    long = trial_sequences(causal_lm, checked.max_length)[0]
    prompt, response = _SHORT
    short = Sequences(long.prompt_ids[:prompt], (long.responses[0][:response],))
    one, other = (_reached(checked, sequences) for sequences in (long, short))
    experts = {weight for block in expert_blocks(causal_lm) for weight in block.parameters()}
    names = [name for name, weight in causal_lm.named_parameters() if weight in (one ^ other) - experts]
    return first_few(names)


def _reached(checked: CheckedModel, sequences: Sequences) -> set[nn.Parameter]:
    """Return the weights with a gradient from the log-probs of these sequences."""
    with torch.enable_grad():
        logps: Tensor = checked.score(pack_trial([sequences]).to(checked.device))
    seen, found, waiting = set(), set(), [logps.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):  # where a gradient ends
                found.add(node.variable)
            waiting += [following for following, _ in node.next_functions]
    return found
