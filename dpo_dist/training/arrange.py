"""Plan micro-batches for the arrangement of the loaded policy, and print what it costs."""

from dataclasses import replace

import numpy as np

from dpo_dist.data.arrangement import Arrangement
from dpo_dist.number_text import percent
from dpo_dist.reference.providers import LiveReference, ReferenceProvider
from dpo_dist.report.terminal.console import Console
from dpo_dist.training.data_setup import Inputs

_SAMPLED_EXAMPLES = 10_000


def arranged(
    inputs: Inputs, arrangement: Arrangement, reference: ReferenceProvider, console: Console
) -> Inputs:
    """Return the inputs for a policy of this arrangement; print the cost of a model that shares no prompts.

    A live reference computes the policy's micro-batches, which also fit the budget in its padded rows.
    """
    pads = False
    if isinstance(reference, LiveReference):
        pads = reference.engine.model.arrangement is Arrangement.padded
    inputs = replace(inputs, arrangement=arrangement, reference_pads=pads)
    if arrangement is not Arrangement.packed:
        console.say(_describe_unpacked(inputs))
    elif pads:
        console.say("unpacked: the reference computes padded rows, one response each; micro-batches fit them")
    return inputs


def _describe_unpacked(inputs: Inputs) -> str:
    dataset, visited = inputs.visited[0]
    sample = np.unique(visited[:_SAMPLED_EXAMPLES])
    responses, counts = dataset.response_indices(sample), dataset.response_counts(sample)
    packed, own = (
        dataset.sizes(sample, responses, counts, replace(inputs.costs, arrangement=arrangement)).tokens.sum()
        for arrangement in (Arrangement.packed, inputs.arrangement)
    )
    how = {
        Arrangement.padded: "one response per row, padded to the longest of the micro-batch",
        Arrangement.single: "one response per forward",
    }[inputs.arrangement]
    return (
        f"unpacked: responses of this model cannot share a prompt in one forward: {how}, "
        f"{percent(own / packed - 1)} more tokens than packed, padding not counted"
    )
