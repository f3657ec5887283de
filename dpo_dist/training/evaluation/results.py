"""Compute and write the results of an evaluation: metrics with intervals, and the scores of every pair."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpo_dist.config.metrics import ALL, METRICS, results_name
from dpo_dist.config.run_folder import EvaluationFolder
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation import files
from dpo_dist.foundation.text import without_secrets
from dpo_dist.objective.intervals import (
    Column,
    bootstrap_intervals,
)
from dpo_dist.objective.metrics import (
    CustomMetrics,
    MetricPlan,
    PairValues,
    length_members,
    measure_pairs,
)
from dpo_dist.training.start.open_run import Run

_Mask = npt.NDArray[np.bool_]
Results = dict[str, dict[str, Any]]

_SHARES = tuple(name for name, metric in METRICS.items() if metric.is_share)


def results(
    means: Mapping[str, float],
    values: PairValues,
    labels: Mapping[str, _Mask],
    prompts: npt.NDArray[np.uint64],
    plan: MetricPlan,
    seed: int,
) -> Results:
    """Return the results of all pairs under `all`, and of each label under its `results_name`.

    Each has the keys of an evaluation's row in log_history.json, `eval_prompts`, and `intervals`: [low, high]
    of each metric that is a mean over pairs or tokens. `means` are the exact metrics of `plan`; `labels` say
    for each source's label whether a pair has it, [pairs]; `prompts` are hashes, [pairs].
    """
    of_all = _group_results(values, prompts, plan, seed)
    of_sources = {f"{name}/{label}" for name in plan.pair_metric_names for label in plan.labels}
    of_all |= {f"eval_{name}": value for name, value in means.items() if name not in of_sources}
    by_name = {ALL: of_all}
    for label, members in labels.items():
        columns = {name: column[members] for name, column in values.by_name.items()}
        row = _group_results(PairValues.from_columns(columns), prompts[members], plan, seed)
        suffix = f"/{label}" if plan.labels else ""
        for metric in plan.pair_metric_names:
            if metric + suffix in means:
                row[f"eval_{metric}"] = means[metric + suffix]
        by_name[results_name(label)] = row
    return by_name


def _group_results(
    values: PairValues, prompts: npt.NDArray[np.uint64], plan: MetricPlan, seed: int
) -> dict[str, Any]:
    """Return those results of some pairs that follow from the values of single pairs."""
    measures = measure_pairs(values.columns)
    members = length_members(values.columns)
    columns: dict[str, tuple[Column, Column]] = {}
    for name, (metric, group) in plan.rows.items():
        if metric in measures and (not group or group in members):
            value, count = (each.double() for each in measures[metric])
            inside = members[group] if group else count > 0
            # Values outside the group become 0, so that one that is not finite spoils its own group only.
            columns[name] = torch.where(inside, value, 0.0).numpy(), (count * inside).numpy()
    lowest = {name: 0.0 for name in columns if name.startswith(_SHARES)}
    intervals = bootstrap_intervals(columns, prompts, seed, lowest)
    row: dict[str, Any] = {}
    for name, (column, counts) in columns.items():
        if counts.sum():
            row[f"eval_{name}"] = float(column.sum() / counts.sum())
    row["eval_pairs"] = len(values)
    row["eval_prompts"] = len(np.unique(prompts))
    row["intervals"] = {f"eval_{name}": list(ends) for name, ends in intervals.items()}
    if plan.loss.is_unpaired:
        is_good = labelled_columns(values)["label"]
        row["eval_good"] = int(is_good.sum())
        row["eval_bad"] = int((~is_good).sum())
    if plan.loss.compares_pairs and len(values):
        row |= {f"eval_{name}": value for name, value in values.margin_percentiles().items()}
    return row


def labelled_columns(values: PairValues) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of labelled records: values of the one response, and whether it is good."""
    is_good = values.tokens_chosen > 0
    titles = {"reward": "reward", "logp": "logp", "reference": "reference_logp", "tokens": "tokens"}
    columns = {}
    for name, title in titles.items():
        chosen = values.by_name[f"{name}_chosen"]
        rejected = values.by_name[f"{name}_rejected"]
        columns[title] = np.where(is_good, chosen, rejected)
    return {**columns, "label": is_good, **values.custom}


def write_scores(
    file: Path, values: PairValues, dataset: PreferenceDataset, *, is_unpaired: bool = False
) -> None:
    """Write the scores of all pairs, or of all labelled records (`is_unpaired`), whole or not at all.

    A line has `source` (the label), `file` and `line`, then rewards, log-probs in nats and lengths in tokens
    of both sides. Values that do not exist, such as a reference's if there is none, are null.
    """
    labels = np.repeat(dataset.source_labels, dataset.source_pairs).tolist()
    if is_unpaired:
        columns = labelled_columns(values)
    else:
        columns = {
            name.replace("reference_", "reference_logp_"): column for name, column in values.by_name.items()
        }
    for name in columns:
        if name.startswith("tokens"):
            columns[name] = columns[name].astype(int)
    with files.staged_file(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for index, label in enumerate(labels):
            origin = dataset.origin(index)
            scores = {name: column[index].item() for name, column in columns.items()}
            file_name = without_secrets(origin.source)
            record = {"source": label, "file": file_name, "line": origin.line, **scores}
            lines.write(files.json_line(files.for_json(record)))


def write_evaluation(
    run: Run,
    folder: EvaluationFolder,
    model: str,
    means: dict[str, float],
    values: PairValues,
    dataset: PreferenceDataset,
    revision: str | None = None,
) -> Results:
    """Write the files of an evaluation to its `folder`, and copies as the newest evaluation's files.

    Each file is written whole or not at all. Returns the results. `model`: the model's path; `revision`: its
    commit, if it is from the hub. `means`: the exact value of every metric.
    """
    config = run.config
    loss = config.loss
    sources = dataset.counts["sources"]
    labels = np.repeat(dataset.source_labels, dataset.source_pairs)
    members = {label: labels == label for label in dataset.source_labels}
    by_name = results(
        means,
        values,
        members,
        np.asarray(dataset.prompt_hashes[:], dtype=np.uint64),
        MetricPlan(loss, dataset.labels, True, CustomMetrics(names=tuple(values.custom))),
        config.trainer.seed,
    )
    description = {
        "model": model,
        "revision": revision,
        "reference": (config.reference.path or config.model.path) if loss.needs_reference else None,
        "loss": "+".join(loss.kinds),
        "pairs": len(dataset),
        "prompts_also_in_train": dataset.counts.get("prompts_also_in_train"),
        "sources": [{"label": source["label"], "path": source["path"]} for source in sources],
    }
    newest = run.folder.evaluation
    for path in (folder.path, newest.path):
        files.remove_abandoned(path)
    files.write_json(folder.evaluated, description)
    write_scores(folder.scores, values, dataset, is_unpaired=loss.is_unpaired)
    files.write_json(folder.results, by_name)
    for file, target in zip(folder.files, newest.files, strict=True):
        with files.staged_file(target) as temporary:
            shutil.copyfile(file, temporary)
    return by_name
