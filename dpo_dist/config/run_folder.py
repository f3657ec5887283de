"""`RunFolder`: every path of a run directory, in one place."""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dpo_dist.foundation.errors import ConfigError

STATE = "state.json"
"""The file of a checkpoint with the state of the training loop."""
BEST_FILE = "best"
"""The file beside the checkpoints with the name of the best one by `trainer.keep_best`."""
_NAME = re.compile(r"step-(\d{1,18})")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after a step: at least six digits."""
    return f"step-{step:06d}"


def checkpoint_step(name: str) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for another name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has the name and the state of a committed checkpoint."""
    return checkpoint_step(folder.name) is not None and (folder / STATE).is_file()


def best_checkpoint(root: Path) -> str | None:
    """Return the name of the best checkpoint below `root`, if one is recorded."""
    file = root / BEST_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def checkpoint_folders(root: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, the newest first, damaged or not."""
    folders = [folder for folder in root.glob("step-*") if checkpoint_step(folder.name) is not None]
    return sorted(
        filter(Path.is_dir, folders), key=lambda folder: checkpoint_step(folder.name) or 0, reverse=True
    )


class PathBelow:
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

    results = PathBelow("evaluation.json")
    scores = PathBelow("scores.jsonl")
    evaluated = PathBelow("evaluated.json")
    worst = PathBelow("worst.jsonl")
    """Pairs with texts, of the last evaluation of training only."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that every evaluation writes."""
        return self.evaluated, self.scores, self.results


@dataclass(frozen=True)
class RunFolder:
    """The run directory at `path`; its properties are paths that may or may not exist."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    config = PathBelow("config.yaml")
    environment = PathBelow("environment.json")
    state = PathBelow("run_state.json")
    """Outcome of the last start and digests of its inputs."""
    lock = PathBelow(".lock")
    """Locked by the start that is running."""
    logs = PathBelow("logs")
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

    metrics = PathBelow("dpo_metrics")
    log_history = PathBelow("dpo_metrics/log_history.json")
    """All metrics rows, each appended when it is logged."""
    metrics_table = PathBelow("dpo_metrics/training_metrics.csv")
    """Written when the run ends."""
    summary = PathBelow("dpo_metrics/summary.json")
    curves = PathBelow("dpo_metrics/training_curves.png")
    report = PathBelow("report.html")
    checkpoints = PathBelow("checkpoints")
    model = PathBelow("model")
    exported = PathBelow("exported")
    """The model folders that `export` writes, by the names of checkpoints."""
    wandb_id = PathBelow("wandb/run_id.txt")
    """The id of the W&B run; the other files in its folder are wandb's own."""
    tensorboard = PathBelow("tensorboard")
    trackers = PathBelow("trackers")
    """What was sent to each tracker but W&B, and the files of those that write into the run directory."""
    samples = PathBelow("samples")

    def samples_file(self, step: int) -> Path:
        """Return the file of the policy's responses after a step."""
        return self.samples / f"{checkpoint_name(step)}.jsonl"

    samples_reference = PathBelow("samples/reference.jsonl")
    """The responses of the reference, from which a resumed run reads them."""

    @property
    def evaluation(self) -> EvaluationFolder:
        """The folder of all evaluations, with the files of the newest one."""
        return EvaluationFolder(self.path / "evaluation")

    def named_evaluation(self, name: str) -> EvaluationFolder:
        """Return the folder of one evaluation, whose name `evaluate` has printed."""
        return EvaluationFolder(self.evaluation.path / name)

    @property
    def last_evaluation(self) -> EvaluationFolder:
        """The folder of the last evaluation of training."""
        return self.named_evaluation("training")

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint after a step."""
        return self.checkpoints / checkpoint_name(step)


def check_writable(folder: Path, key: str = "run.dir") -> None:
    """Raise ConfigError if a folder, which `key` names, cannot be made or written; create nothing."""
    above = next(filter(os.path.lexists, (folder, *folder.absolute().parents)))
    if not above.is_dir() or not os.access(above, os.W_OK):
        got = str(above)
        if not above.is_dir():
            got = f"{folder}: {above} is not a folder"
        raise ConfigError(
            f"{key} cannot be written",
            where=key,
            got=got,
            expected="a folder that exists or can be created, with write permission",
            remedy=f"set {key} to another folder, or make this one writable",
        )


def strip_key(word: str) -> str:
    """Return the path in a word that may begin with a key: `run.dir=output/a`, `model.path=./m`."""
    return re.sub(r"^(run|model)([._](dir|path))?=", "", word)


def existing_run(path: Path) -> RunFolder:
    """Return the run directory at `path`, of a run that may still be training; ConfigError for others."""
    folder = RunFolder(path)
    if any(file.is_file() for file in (folder.config, folder.log_history)):
        return folder
    beside = sorted((path if path.is_dir() else path.parent).glob("*/config.yaml"))
    nearest = get_close_matches(str(path), [str(file.parent) for file in beside], 3, cutoff=0)
    above = [str(parent) for parent in path.parents if (parent / "config.yaml").is_file()]
    if above:
        nearest = above[:1]  # `path` is inside a run: its model, a checkpoint or a page
    remedy = "name the run.dir of a run"
    if nearest:
        remedy = f"name one run, such as {' or '.join(nearest)}"
    raise ConfigError(
        "this is no run directory",
        where=str(path),
        got="a folder without a run" if path.exists() else "no such folder",
        expected="a folder with config.yaml, which a run writes before its first step",
        remedy=remedy,
    )


def no_model_error(run: RunFolder, key: str, remedy: str) -> ConfigError:
    """Return the error for a run directory without a trained model, which `key` names."""
    checkpoints = checkpoint_folders(run.checkpoints)
    alternative = f"the checkpoint {checkpoints[0]}" if checkpoints else "another model"
    return ConfigError(
        "this run directory has no model",
        where=key,
        got=str(run.path),
        expected=f"{run.model}, which a run writes when it completes",
        remedy=f"{remedy}, or name {alternative}",
    )
