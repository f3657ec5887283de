"""The best checkpoints of a run by a metric of its evaluations."""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_dist.config.checkpoint_folders import checkpoint_name
from dpo_dist.config.keep_best import PREFIX, direction_of
from dpo_dist.config.schema import Direction, RunConfig, TrainerConfig
from dpo_dist.distributed.checkpoint_manifest import has_all_files
from dpo_dist.errors import ConfigError
from dpo_dist.objective.metrics import MetricPlan
from dpo_dist.objective.pair_values import MARGIN_PERCENTILES
from dpo_dist.training.position import BestCheckpoint


def check_keep_best(config: RunConfig, labels: tuple[str, ...]) -> None:
    """Check that every evaluation has the metric `trainer.keep_best`.

    Args:
        config: of the run.
        labels: of the sources of the evaluation data; none if there is only one.

    Raises:
        ConfigError: no evaluation has it.
    """
    metric, loss = config.trainer.keep_best, config.loss
    if metric is None:
        return
    names = MetricPlan(loss, labels, is_evaluation=True).names
    names += () if loss.is_one_sided else MARGIN_PERCENTILES
    found = [PREFIX + name for name in names]
    if metric not in found:
        near = difflib.get_close_matches(metric, found, n=3) or found[:3]
        raise ConfigError(
            "the evaluations of this run do not have this metric",
            where="trainer.keep_best",
            got=metric,
            expected=f"a metric of docs/metrics.md, such as {', '.join(near)}",
            remedy="set trainer.keep_best to one of them; of one source: eval_rewards/accuracies/LABEL",
        )


def best_after(
    trainer: TrainerConfig, best: Sequence[BestCheckpoint], step: int, row: Mapping[str, float]
) -> list[BestCheckpoint]:
    """Return the best checkpoints after an evaluation, the best first; of equal ones, the earlier is better.

    Args:
        trainer: with `keep_best`; without, there are none.
        best: those before, of this metric or of another one, which do not count.
        step: of the evaluation; the start of a run has no checkpoint.
        row: its metrics row; a value that is missing or not finite is never among the best.
    """
    metric = trainer.keep_best
    if metric is None:
        return []
    kept = [one for one in best if one.metric == metric and one.step != step]
    if step > 0 and math.isfinite(row.get(metric, math.nan)):
        kept.append(BestCheckpoint(metric, step, row[metric]))
    sign = -1 if direction_of(trainer) is Direction.highest else 1
    return sorted(kept, key=lambda one: (sign * one.value, one.step))[: trainer.keep_best_count]


def still_there(best: Sequence[BestCheckpoint], root: Path) -> list[BestCheckpoint]:
    """Return those whose checkpoints below `root` are complete, checked by size only.

    After the newest checkpoint was damaged, that of an earlier step names best ones that are deleted since.
    """
    return [one for one in best if has_all_files(root / checkpoint_name(one.step))]
