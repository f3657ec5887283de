"""TensorBoard and MLflow, by accelerate's trackers; only rank 0 opens them."""

from pathlib import Path
from typing import Any

from accelerate.tracking import MLflowTracker, TensorBoardTracker


def open_tensorboard(folder: Path, first_step: int) -> Any:
    """Return a tracker that writes event files.

    Args:
        folder: of the event files of all starts of a run.
        first_step: TensorBoard drops events of earlier starts from this step on.
    """
    tracker = TensorBoardTracker(folder.name, folder.parent, purge_step=first_step)
    tracker.start()
    return tracker


def open_mlflow(project: str, name: str, run_id: str | None, folder: Path) -> Any:
    """Return a tracker of a run of MLflow, at MLFLOW_TRACKING_URI or in a database in `folder`.

    Its `tracker` is MLflow's run, with the last value of every metric that earlier starts logged.

    Args:
        project: the experiment.
        name: of the run.
        run_id: of the run that is continued; None: a new one.
        folder: for the database.
    """
    import mlflow  # noqa: PLC0415 (an optional package)

    if not mlflow.is_tracking_uri_set():
        folder.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    tracker = MLflowTracker(project, run_id=run_id, run_name=name)
    tracker.start()
    return tracker
