"""The best checkpoints by an evaluation metric."""

from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig, TrainerConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.training.loop import best_after, check_keep_best, still_there
from dpo_dist.training.state import BestCheckpoint
from tests.support.one_weight import Run

ACCURACY = "eval_rewards/accuracies"


def kept(trainer: TrainerConfig, *values: float) -> list[int]:
    """The steps of the best after evaluations with `values` at steps 0, 1, 2, ..."""
    best: list[BestCheckpoint] = []
    for step, value in enumerate(values):
        best = best_after(trainer, best, step, {str(trainer.keep_best): value})
    return [one.step for one in best]


@pytest.mark.parametrize(
    ("metric", "values", "steps"),
    [
        (ACCURACY, [9.0, 0.5, 0.7, 0.6], [2]),
        (ACCURACY, [9.0, 0.5, 0.7, 0.7], [2]),
        (f"{ACCURACY}/math", [0.0, 0.5, 0.4], [1]),
        ("eval_loss", [0.0, 0.5, 0.7, 0.4], [3]),
    ],
)
def test_the_best_values_are_kept(metric: str, values: list[float], steps: list[int]) -> None:
    trainer = TrainerConfig(keep_best=metric)
    assert kept(trainer, *values) == steps


def test_another_metric_starts_again_and_none_keeps_none() -> None:
    best = [BestCheckpoint(ACCURACY, 5, 0.9)]
    of_loss = best_after(TrainerConfig(keep_best="eval_loss"), best, 10, {"eval_loss": 0.5, ACCURACY: 0.1})
    assert of_loss == [BestCheckpoint("eval_loss", 10, 0.5)]
    assert best_after(TrainerConfig(), best, 10, {ACCURACY: 1.0}) == []
    assert best_after(TrainerConfig(keep_best=ACCURACY), best, 10, {"eval_loss": 0.5}) == best


def run_of(*options: str) -> RunConfig:
    data = ["data.train=[a.jsonl]", "data.eval=[b.jsonl]", "trainer.eval_every=5"]
    return load_run_config(["model.path=org/model", *data, *options])


@pytest.mark.parametrize(
    ("metric", "loss", "near"),
    [
        (f"{ACCURACY}/maths", "sigmoid", f"{ACCURACY}/math"),
        (ACCURACY, "sft", "eval_rewards/chosen"),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused(metric: str, loss: str, near: str) -> None:
    config = run_of(f"trainer.keep_best={metric}", f"loss={loss}")
    with pytest.raises(ConfigError, match="do not have this metric") as error:
        check_keep_best(config, ("math", "code"))
    assert near in error.value.expected


def test_best_checkpoints_that_were_deleted_do_not_count(tmp_path: Path) -> None:
    """The newest checkpoint, for which the best one was deleted, is damaged: the one before names it."""
    run = Run(tmp_path, keep_last=2)
    run.start()
    for step, best in ((1, [1]), (2, [1]), (3, [3]), (4, [3])):
        run.weights.weight.fill_(step)
        run.saver.save(step, {"step": step, "best": [{"step": one} for one in best]})
    run.saver.commit()
    assert run.left() == ["step-000003", "step-000004"]
    first, third = BestCheckpoint(ACCURACY, 1, 0.8), BestCheckpoint(ACCURACY, 3, 0.9)
    assert still_there([third, first], tmp_path) == [third]
