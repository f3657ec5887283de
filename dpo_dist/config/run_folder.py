"""`RunFolder`: every path of a run directory, in one place."""

import os
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import read_small

STATE = "state.json"
"""The file of a checkpoint with the state of the training loop."""
BEST = "best"
"""The file beside the checkpoints with the names of the best ones by `trainer.keep_best`, the best first."""
_NAME = re.compile(r"step-(\d{1,18})")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after a step: at least six digits."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for another name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has the name and the state of a committed checkpoint."""
    return step_of(folder.name) is not None and (folder / STATE).is_file()


def best_checkpoints(root: Path) -> list[str]:
    """Return the names of the best checkpoints below `root`, the best first."""
    try:
        names = read_small(root / BEST).decode().split()
    except (OSError, ValueError):
        return []
    return [name for name in names if step_of(name) is not None]


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, the newest first, damaged or not.

    The order is that of the numbers: from step 1,000,000 on, names have more digits.
    """
    folders = [folder for folder in root.glob("step-*") if step_of(folder.name) is not None]
    return sorted(filter(Path.is_dir, folders), key=lambda folder: step_of(folder.name) or 0, reverse=True)


LAST_EVALUATION = "training"
"""The name of the last evaluation of training."""


class At:
    """A path below the `path` of the instance."""

    def __init__(self, below: str) -> None:
        self._below = below

    def __get__(self, folder: Any, _: type) -> Path:
        below: Path = folder.path / self._below
        return below


@dataclass(frozen=True)
class EvaluationFolder:
    """The files of one evaluation."""

    path: Path

    results = At("evaluation.json")
    """Metrics of all pairs and of each label, with intervals."""
    scores = At("scores.jsonl")
    """Rewards and log-probs of every pair."""
    evaluated = At("evaluated.json")
    """The model, the pairs and the reference of the evaluation."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return self.evaluated, self.scores, self.results


@dataclass(frozen=True)
class RunFolder:
    """The run directory at `path`; its properties are paths that may or may not exist."""

    path: Path

    def check_writable(self) -> None:
        """Raise ConfigError if the folder cannot be made or written; create nothing."""
        above = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ConfigError(
                "run.dir cannot be written",
                where="run.dir",
                got=str(above),
                remedy="set run.dir to another folder, or make this one writable",
            )

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        """Return the run directory of `config`: `run.dir`."""
        return cls(Path(str(config.run.dir)))

    def __str__(self) -> str:
        return str(self.path)

    config = At("config.yaml")
    """The resolved configuration."""
    environment = At("environment.json")
    """Versions, git commit and hardware."""
    state = At("run_state.json")
    """Outcome of the last start and digests of its inputs."""
    lock = At(".lock")
    """Locked by the start that is running."""
    logs = At("logs")
    """The folder of the log files."""

    def bad_step(self, step: int) -> Path:
        """Return the file about a step that was skipped because it was not finite."""
        return self.logs / f"bad-step-{step:06d}.json"

    def rank_log(self, rank: int | str) -> Path:
        """Return the log file of a rank."""
        return self.logs / f"rank-{rank}.log"

    def rank_stacks(self, rank: int | str) -> Path:
        """Return the file with the stacks of a rank's threads, written if a run hangs."""
        return self.logs / f"rank-{rank}.stacks.txt"

    metrics = At("dpo_metrics")
    """The folder of the next four files."""
    log_history = At("dpo_metrics/log_history.json")
    """The metrics rows as JSON."""
    metrics_table = At("dpo_metrics/training_metrics.csv")
    """The metrics rows as CSV."""
    summary = At("dpo_metrics/summary.json")
    """The summary of a run that has ended."""
    curves = At("dpo_metrics/training_curves.png")
    """The plot of the metrics."""
    report = At("report.html")
    """The self-contained page about the run."""
    checkpoints = At("checkpoints")
    """The folder of the committed checkpoints."""
    model = At("model")
    """The trained model."""

    def exported(self, name: str) -> Path:
        """Return the model folder that `export` writes from a checkpoint of this name."""
        return self.path / "exported" / name

    wandb_id = At("wandb/run_id.txt")
    """The id of the W&B run; the other files in its folder are wandb's own."""
    tensorboard = At("tensorboard")
    """The folder of TensorBoard's event files."""
    samples = At("samples")
    """The folder of the responses to held-out prompts during training."""

    def samples_file(self, step: int) -> Path:
        """Return the file of the policy's responses after a step."""
        return self.samples / f"{checkpoint_name(step)}.jsonl"

    samples_reference = At("samples/reference.jsonl")
    """The responses of the reference, from which a resumed run reads them."""

    @property
    def evaluation(self) -> EvaluationFolder:
        """The folder of all evaluations, with the files of the newest one."""
        return EvaluationFolder(self.path / "evaluation")

    def evaluation_of(self, name: str) -> EvaluationFolder:
        """Return the folder of one evaluation: `LAST_EVALUATION`, or a name that `evaluate` has printed."""
        return EvaluationFolder(self.evaluation.path / name)

    comparison = At("comparison")
    """The folder of a comparison of models; the next five are in it."""
    comparison_answers = At("comparison/answers.jsonl")
    """The responses of all models, prompt by prompt."""
    comparison_results = At("comparison/comparison.json")
    """KL, scores, win rates and style of the models."""
    comparison_page = At("comparison/comparison.html")
    """The same as a self-contained page."""
    comparison_parts = At("comparison/parts")
    """Finished parts of the work, by the digest of the settings that define them."""
    comparison_models = At("comparison/models")
    """Model folders written from checkpoints."""
    doctor_report = At("doctor/doctor.json")
    """The findings of the doctor about the data, as JSON."""
    doctor_page = At("doctor/doctor.html")
    """The same as a self-contained page."""
    pairs = At("pairs")
    """The folder of preference records and samples; the next five are in it."""
    pairs_file = At("pairs/pairs.jsonl")
    """The preference records of `pairs`."""
    pairs_samples = At("pairs/samples.jsonl")
    """Every response that models gave to the prompts, with its scores."""
    pairs_parts = At("pairs/parts")
    """Finished parts of the work, by the digest of the settings that define them."""
    pairs_judgements = At("pairs/judgements.jsonl")
    """The log of a labelling session."""
    pairs_agreement = At("pairs/agreement.json")
    """Agreement of the annotators."""
    rounds = At("rounds")
    """The folder of the rounds; the next two files are in it."""
    rounds_config = At("rounds/config.yaml")
    """The configuration that the rounds share."""
    rounds_summary = At("rounds/rounds.json")
    """Scores and trainings of all rounds."""

    def round(self, number: int) -> "RunFolder":
        """Return the folder of a round, which is the run directory of its sampling."""
        return RunFolder(self.rounds / str(number))

    round_result = At("round.json")
    """The finished stages of a round, in its folder."""

    @property
    def training(self) -> "RunFolder":
        """The run directory of a round's training, in the round's folder."""
        return RunFolder(self.path / "train")

    policy = At("policy")
    """The policy after a round that trains an adapter, merged into its base; in the round's folder."""


_MOST_SUGGESTED = 3


def existing_run(path: Path) -> RunFolder:
    """Return the run directory at `path`, whose run may still be training.

    Raises:
        ConfigError: `path` is none.
    """
    folder = RunFolder(path)
    if any(file.is_file() for file in (folder.config, folder.log_history, folder.metrics_table)):
        return folder
    above = path if path.is_dir() else path.parent
    runs = sorted(file.parent for file in above.glob("*/config.yaml"))
    runs = sorted(runs, key=lambda run: -SequenceMatcher(None, run.name, path.name).ratio())[:_MOST_SUGGESTED]
    found = "a file" if path.is_file() else "a folder without a run's files"
    raise ConfigError(
        "this is no run directory",
        where=str(path),
        got=found if path.exists() else "no such folder",
        expected="a folder with config.yaml, which a run writes before its first step",
        remedy=f"name one run, such as {' or '.join(map(str, runs))}"
        if runs
        else "name the run.dir of a run",
    )


def without_model(run: RunFolder, key: str, remedy: str) -> ConfigError:
    """Return the error of a run directory without a trained model.

    Args:
        run: the run.
        key: that names it.
        remedy: another one than to name its newest checkpoint.
    """
    checkpoints = checkpoint_folders(run.checkpoints)
    named = f"its checkpoint {checkpoints[0]}" if checkpoints else "another model"
    return ConfigError(
        "this run directory has no model",
        where=key,
        got=str(run.path),
        expected=f"{run.model}, which a run writes when it completes",
        remedy=f"{remedy}, or name {named}",
    )
