"""`RunFolder`: every path of a run directory, in one place."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

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


@dataclass(frozen=True)
class EvaluationFolder:
    """The files of one evaluation."""

    path: Path

    @property
    def results(self) -> Path:
        """Metrics of all pairs and of each label, with intervals."""
        return self.path / "evaluation.json"

    @property
    def scores(self) -> Path:
        """Rewards and log-probs of every pair."""
        return self.path / "scores.jsonl"

    @property
    def evaluated(self) -> Path:
        """The model, the pairs and the reference of the evaluation."""
        return self.path / "evaluated.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return self.evaluated, self.scores, self.results


@dataclass(frozen=True)
class RunFolder:
    """The run directory at `path`; its properties are paths that may or may not exist."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        """Return the run directory of `config`: `run.dir`."""
        return cls(Path(str(config.run.dir)))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, git commit and hardware."""
        return self.path / "environment.json"

    @property
    def state(self) -> Path:
        """Outcome of the last start and digests of its inputs."""
        return self.path / "run_state.json"

    @property
    def lock(self) -> Path:
        """Locked by the start that is running."""
        return self.path / ".lock"

    @property
    def logs(self) -> Path:
        """The folder of the log files."""
        return self.path / "logs"

    def bad_step(self, step: int) -> Path:
        """Return the file about a step that was skipped because it was not finite."""
        return self.logs / f"bad-step-{step:06d}.json"

    def loss_spike(self, step: int) -> Path:
        """Return the file about a metrics row whose loss is far above those before."""
        return self.logs / f"loss-spike-{step:06d}.json"

    def rank_log(self, rank: int | str) -> Path:
        """Return the log file of a rank."""
        return self.logs / f"rank-{rank}.log"

    def rank_stacks(self, rank: int | str) -> Path:
        """Return the file with the stacks of a rank's threads, written if a run hangs."""
        return self.logs / f"rank-{rank}.stacks.txt"

    @property
    def metrics(self) -> Path:
        """The folder of the next four files."""
        return self.path / "dpo_metrics"

    @property
    def log_history(self) -> Path:
        """The metrics rows as JSON."""
        return self.metrics / "log_history.json"

    @property
    def metrics_table(self) -> Path:
        """The metrics rows as CSV."""
        return self.metrics / "training_metrics.csv"

    @property
    def summary(self) -> Path:
        """The summary of a run that has ended."""
        return self.metrics / "summary.json"

    @property
    def curves(self) -> Path:
        """The plot of the metrics."""
        return self.metrics / "training_curves.png"

    @property
    def report(self) -> Path:
        """The self-contained page about the run."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The folder of the committed checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model"

    def exported(self, name: str) -> Path:
        """Return the model folder that `export` writes from a checkpoint of this name."""
        return self.path / "exported" / name

    @property
    def wandb_id(self) -> Path:
        """The id of the W&B run; the other files in its folder are wandb's own."""
        return self.path / "wandb" / "run_id.txt"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        """The folder of the responses to held-out prompts during training."""
        return self.path / "samples"

    def samples_file(self, step: int) -> Path:
        """Return the file of the policy's responses after a step."""
        return self.samples / f"{checkpoint_name(step)}.jsonl"

    @property
    def samples_reference(self) -> Path:
        """The responses of the reference, from which a resumed run reads them."""
        return self.samples / "reference.jsonl"

    @property
    def evaluation(self) -> EvaluationFolder:
        """The folder of all evaluations, with the files of the newest one."""
        return EvaluationFolder(self.path / "evaluation")

    def evaluation_of(self, name: str) -> EvaluationFolder:
        """Return the folder of one evaluation: `LAST_EVALUATION`, or a name that `evaluate` has printed."""
        return EvaluationFolder(self.evaluation.path / name)

    @property
    def comparison(self) -> Path:
        """The folder of a comparison of models; the next five are in it."""
        return self.path / "comparison"

    @property
    def comparison_answers(self) -> Path:
        """The responses of all models, prompt by prompt."""
        return self.comparison / "answers.jsonl"

    @property
    def comparison_results(self) -> Path:
        """KL, scores, win rates and style of the models."""
        return self.comparison / "comparison.json"

    @property
    def comparison_page(self) -> Path:
        """The same as a self-contained page."""
        return self.comparison / "comparison.html"

    @property
    def comparison_parts(self) -> Path:
        """Finished parts of the work, by the digest of the settings that define them."""
        return self.comparison / "parts"

    @property
    def comparison_models(self) -> Path:
        """Model folders written from checkpoints."""
        return self.comparison / "models"

    @property
    def doctor_report(self) -> Path:
        """The findings of the doctor about the data, as JSON."""
        return self.path / "doctor" / "doctor.json"

    @property
    def doctor_page(self) -> Path:
        """The same as a self-contained page."""
        return self.path / "doctor" / "doctor.html"

    @property
    def pairs(self) -> Path:
        """The folder of preference records and samples; the next five are in it."""
        return self.path / "pairs"

    @property
    def pairs_file(self) -> Path:
        """The preference records, unless `pairs.output` names another file."""
        return self.pairs / "pairs.jsonl"

    @property
    def pairs_samples(self) -> Path:
        """Every response that models gave to the prompts, with its scores."""
        return self.pairs / "samples.jsonl"

    @property
    def pairs_parts(self) -> Path:
        """Finished parts of the work, by the digest of the settings that define them."""
        return self.pairs / "parts"

    @property
    def pairs_judgements(self) -> Path:
        """The log of a labelling session."""
        return self.pairs / "judgements.jsonl"

    @property
    def pairs_agreement(self) -> Path:
        """Agreement of the annotators."""
        return self.pairs / "agreement.json"

    @property
    def rounds(self) -> Path:
        """The folder of the rounds; the next two files are in it."""
        return self.path / "rounds"

    @property
    def rounds_config(self) -> Path:
        """The configuration that the rounds share."""
        return self.rounds / "config.yaml"

    @property
    def rounds_summary(self) -> Path:
        """Scores and trainings of all rounds."""
        return self.rounds / "rounds.json"

    def round(self, number: int) -> "RunFolder":
        """Return the folder of a round, which is the run directory of its sampling."""
        return RunFolder(self.rounds / str(number))

    @property
    def round_result(self) -> Path:
        """The finished stages of a round, in its folder."""
        return self.path / "round.json"

    @property
    def training(self) -> "RunFolder":
        """The run directory of a round's training, in the round's folder."""
        return RunFolder(self.path / "train")

    @property
    def policy(self) -> Path:
        """The policy after a round that trains an adapter, merged into its base; in the round's folder."""
        return self.path / "policy"


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
