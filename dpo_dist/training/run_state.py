"""`run_state.json`: outcome and progress of a run, and digests of its inputs. Rank 0 writes it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_dist.atomic import write_text
from dpo_dist.config.identity import run_digest
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.dataset import PreferenceDataset
from dpo_dist.data.former_encodings import was_fingerprint_of
from dpo_dist.errors import CheckpointError, RunOutcome
from dpo_dist.small_files import read_small
from dpo_dist.training.data_setup import Inputs
from dpo_dist.training.length import as_text

Identity = dict[str, str | None]

_NAMES = {
    "data": "training data",
    "eval_data": "evaluation data",
    "model": "model that the policy starts from",
    "reference": "reference model",
}
_LENGTH = "length"
"""Part of the configuration's digest; a run may be continued to a greater one."""
# By the names of `Inputs.named`.
_DATA = {"data": "train", "eval_data": "eval"}


@dataclass(frozen=True)
class RunState:
    """Content of the state file.

    Attributes:
        outcome: of the run so far.
        step: the number of steps done; with `started` and `diverged`, at the last checkpoint.
        identity: digests of all inputs that decide the result.
        summary: content of summary.json with `exported`, else None.
        stopped_by: the reasons of a stop: signals, limits, the tracker; None with another outcome.
    """

    outcome: RunOutcome
    step: int
    identity: Identity
    summary: dict[str, Any] | None = None
    stopped_by: str | None = None


def read_state(folder: RunFolder) -> RunState | None:
    """Return the recorded state of the run in `folder`; None if there is none.

    Raises:
        CheckpointError: the file cannot be read or was changed.
    """
    file = folder.state
    try:
        content = json.loads(read_small(file))
        state = RunState(**{**content, "outcome": RunOutcome(content["outcome"])})
        if not isinstance(state.step, int) or not isinstance(state.identity, dict):
            raise TypeError("step must be a number, and identity a mapping of names to digests")
        return state
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            "the state of this run cannot be read",
            where=str(file),
            got=f"{type(error).__name__}: {error}",
            remedy="restore the file, or delete it to resume from the last checkpoint",
        ) from error


def write_state(folder: RunFolder, state: RunState) -> None:
    """Write the state file whole."""
    write_text(folder.state, json.dumps(asdict(state), indent=1) + "\n")


def check_no_progress(state: RunState | None, folder: RunFolder) -> None:
    """Check, where no checkpoint is found, that none was saved.

    Raises:
        CheckpointError: one was; its disk may not be mounted.
    """
    if state is None or state.step == 0:
        return
    raise CheckpointError(
        f"this run has done {state.step:,} steps, and its checkpoints are missing",
        where=str(folder.checkpoints),
        got=f"no checkpoint, and the state {state.outcome} after step {state.step:,} in {folder.state.name}",
        remedy=f"put the checkpoints back, or mount their disk; to train from the beginning, delete "
        f"{folder.state.name}, or set another run.dir",
    )


def identify(config: RunConfig, inputs: Inputs) -> Identity:
    """Return the digests of all inputs that decide a run's result."""
    return {
        "run_digest": run_digest(config),
        "data": inputs.train_set.fingerprint,
        "eval_data": inputs.eval_set.fingerprint if inputs.eval_set is not None else None,
        "model": inputs.policy_files.digest,
        "reference": inputs.reference_files.digest if inputs.reference_files is not None else None,
        _LENGTH: as_text(config),
    }


def check_identity(
    recorded: Mapping[str, Any], identity: Identity, where: Path, datasets: Mapping[str, PreferenceDataset]
) -> None:
    """Check that the inputs of a run have not changed.

    Args:
        recorded: the state of a checkpoint, or the identity in the state file.
        identity: of this start.
        where: the file or folder with `recorded`.
        datasets: `Inputs.named`; an earlier version may have encoded the same examples into other folders.

    Raises:
        CheckpointError: files that the configuration names have changed.
    """
    for name, digest in identity.items():
        former = recorded.get(name)
        dataset = datasets.get(_DATA.get(name, ""))
        if name in (_LENGTH, "run_digest"):  # of `check_configuration`
            continue
        if former == digest or (dataset and former and was_fingerprint_of(former, dataset.encoded)):
            continue
        also = (
            " (also those of the tokenizer; after an update of this program those in data.cache)"
            if dataset
            else ""
        )
        raise CheckpointError(
            f"the {_NAMES[name]} of this run changed since it was last saved",
            where=str(where),
            got=f"digest {digest}",
            expected=f"digest {former}",
            remedy=f"restore the former files{also}, or start a new run with another run.dir",
        )
