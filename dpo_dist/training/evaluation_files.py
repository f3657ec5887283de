"""The files of an evaluation, written from its values: by training for its last one, and by `evaluate`."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.atomic import collect_abandoned, staged_file, write_text
from dpo_dist.config.run_folder import EvaluationFolder, RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.evaluation.results import Mask, Resampling, results
from dpo_dist.evaluation.scores import write_scores
from dpo_dist.json_values import plain
from dpo_dist.objective.metrics import MetricPlan
from dpo_dist.objective.pair_values import PairValues
from dpo_dist.report.charts.evaluation_plot import draw_evaluation


def write_evaluation(
    name: str,
    model: str,
    config: RunConfig,
    means: dict[str, float],
    values: PairValues,
    dataset: PreferenceDataset,
    revision: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Write the files of an evaluation, each whole or not at all; return its results.

    They are written into its folder, and become those of the newest evaluation, which are links where the
    file system has them.

    Args:
        name: of its folder.
        model: the path of the model.
        config: of the run.
        means: exact means of all metrics of the evaluation.
        values: of every pair.
        dataset: the evaluated pairs.
        revision: the commit of a model from the hub.
    """
    folder = RunFolder.of(config)
    found = results(
        means,
        values,
        _members(dataset),
        np.asarray(dataset.prompts[:], dtype=np.uint64),
        MetricPlan(config.loss, dataset.labels, is_evaluation=True),
        Resampling(config.evaluation.resamples, config.trainer.seed),
    )
    own = folder.evaluation_of(name)
    for written in (own.path, folder.evaluation.path):
        collect_abandoned(written)
    write_text(own.evaluated, json.dumps(_evaluated(model, revision, config, dataset), indent=1) + "\n")
    write_scores(own.scores, values, dataset)
    draw_evaluation(found, own.picture, f"{name} of {folder.path.resolve().name}")
    write_text(own.results, json.dumps(plain(found), indent=1) + "\n")
    make_newest(own, folder.evaluation)
    return found


def make_newest(own: EvaluationFolder, newest: EvaluationFolder) -> None:
    """Make the files of an evaluation those of the newest one, not mixed with those of a second process."""
    with _locked(newest.path):
        for file, target in zip(own.files, newest.files, strict=True):
            with staged_file(target) as temporary:
                try:
                    os.link(file, temporary)
                except OSError:  # a file system without links
                    shutil.copyfile(file, temporary)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for the lock of a folder; nothing on a file system that cannot lock one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _members(dataset: PreferenceDataset) -> dict[str, Mask]:
    """Return for each label whether a pair has it, [pairs]."""
    found: dict[str, Mask] = {}
    start = 0
    for label, pairs in zip(dataset.source_labels, dataset.source_pairs, strict=True):
        found.setdefault(label, np.zeros(len(dataset), dtype=np.bool_))[start : start + pairs] = True
        start += pairs
    return found


def _evaluated(
    model: str, revision: str | None, config: RunConfig, dataset: PreferenceDataset
) -> dict[str, Any]:
    """Return the content of evaluated.json."""
    sources = dataset.counts["sources"]
    return {
        "model": model,
        "revision": revision,
        "reference": config.reference.path or config.model.path if config.loss.needs_reference else None,
        "loss": "+".join(config.loss.kinds),
        "pairs": len(dataset),
        "sources": [{"label": source["label"], "path": source["path"]} for source in sources],
    }
