"""Rows whose loss is far above those before: counted, and the pairs of their steps named."""

import json
from collections.abc import Callable

from dpo_dist.atomic import write_text
from dpo_dist.diagnostics.run_step_faults import spike_of_last
from dpo_dist.report.metrics_log import MetricsLog, Row
from dpo_dist.training.bad_steps import describe_pairs
from dpo_dist.training.data_setup import Inputs


def name_spike(row: Row, metrics: MetricsLog, inputs: Inputs, say: Callable[[str], None]) -> None:
    """Add `loss_spikes`, the number of spikes so far, to a row of steps; write the pairs of a spike and warn.

    Args:
        row: to be recorded next.
        metrics: the rows before.
        inputs: of the run.
        say: called with the warning.
    """
    last: Row = next((before for before in reversed(metrics.rows) if "loss" in before), {})
    row["loss_spikes"] = last.get("loss_spikes", 0)
    spike = spike_of_last(metrics.rows, row)
    if spike is None:
        return
    row["loss_spikes"] += 1
    named = {  # the row is a mean over the steps since the last one
        step + 1: describe_pairs(inputs.train_set, inputs.sampler.indices(step))
        for step in range(int(last["step"]), spike.step)
    }
    content = {"step": spike.step, "loss": spike.loss, "usual_loss": spike.usual, "pairs_by_step": named}
    file = metrics.folder.loss_spike(spike.step)
    write_text(file, json.dumps(content, indent=1) + "\n")
    say(
        f"warning: the loss jumped to {spike.loss:.4g} at step {spike.step}, from {spike.usual:.4g} before; "
        f"its pairs: {file}"
    )
