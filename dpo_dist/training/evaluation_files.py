"""The files of an evaluation, written from its values: by training for its last one, and by `evaluate`."""

import json
from typing import Any

import numpy as np

from dpo_dist.atomic import write_text
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.evaluation.results import Resampling, results
from dpo_dist.evaluation.scores import write_scores
from dpo_dist.objective.metrics import MetricPlan
from dpo_dist.objective.pair_values import PairValues
from dpo_dist.report.json_values import plain


def write_evaluation(
    config: RunConfig, means: dict[str, float], values: PairValues, dataset: PreferenceDataset
) -> dict[str, dict[str, Any]]:
    """Write scores, then results, each whole or not at all; return the results.

    A label that is the name of the results of all pairs has none of its own, if there are several.

    Args:
        config: of the run.
        means: exact means of all metrics of the evaluation.
        values: of every pair.
        dataset: the evaluated pairs.
    """
    folder = RunFolder.of(config)
    sources = np.repeat(dataset.source_labels, dataset.source_pairs)
    found = results(
        means,
        values,
        {label: sources == label for label in dict.fromkeys(dataset.source_labels)},
        np.asarray(dataset.prompts[:], dtype=np.uint64),
        MetricPlan(config.loss, dataset.labels, is_evaluation=True),
        Resampling(config.evaluation.resamples, config.trainer.seed),
    )
    write_scores(folder.evaluation_scores, values, dataset)
    write_text(folder.evaluation, json.dumps(plain(found), indent=1) + "\n")
    return found
