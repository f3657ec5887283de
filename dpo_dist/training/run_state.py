"""State of a run in one file: what has been done, and with which inputs. Written whole, by rank 0."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_dist.atomic import write_text
from dpo_dist.config.identity import run_digest
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.errors import CheckpointError, Outcome
from dpo_dist.training.data_setup import Inputs

Identity = dict[str, str | None]

_IDENTITY_WORDS = {
    "run_digest": "configuration",
    "data": "training data",
    "eval_data": "evaluation data",
    "model": "model that the policy starts from",
    "reference": "reference model",
}


@dataclass(frozen=True)
class RunState:
    """Content of the state file.

    Attributes:
        outcome: what the run has come to.
        step: the number of steps done, of `started` those it started from.
        identity: digests of what the run's result depends on.
        summary: of a run whose model is written, what summary.json tells.
    """

    outcome: Outcome
    step: int
    identity: Identity
    summary: dict[str, Any] | None = None


def read_state(folder: RunFolder) -> RunState | None:
    """Return the recorded state of the run in `folder`; None if there is none.

    Raises:
        CheckpointError: the file is not what `write_state` wrote.
    """
    file = folder.state
    try:
        content = json.loads(file.read_bytes())
        state = RunState(**{**content, "outcome": Outcome(content["outcome"])})
        if not isinstance(state.step, int) or not isinstance(state.identity, dict):
            raise TypeError("step is a number, and identity has digests by their names")
        return state
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            "the state of this run cannot be read",
            where=str(file),
            got=f"{type(error).__name__}: {error}",
            remedy="restore the file, or delete it to resume from the last checkpoint",
        ) from error


def write_state(folder: RunFolder, state: RunState) -> None:
    """Write the state file whole."""
    write_text(folder.state, json.dumps(asdict(state), indent=1) + "\n")


def identify(config: RunConfig, inputs: Inputs) -> Identity:
    """Return the digests of what a run's result depends on."""
    return {
        "run_digest": run_digest(config),
        "data": inputs.train_set.fingerprint,
        "eval_data": inputs.eval_set.fingerprint if inputs.eval_set is not None else None,
        "model": inputs.policy_files.digest,
        "reference": inputs.reference_files.digest if inputs.reference_files is not None else None,
    }


def check_identity(recorded: dict[str, Any], identity: Identity, where: Path) -> None:
    """Accept inputs that are those that a run has been training with.

    Args:
        recorded: a checkpoint's state, or the identity in the state file.
        identity: of this start.
        where: the file or folder that `recorded` is from.

    Raises:
        CheckpointError: files that the configuration names have changed since, or another configuration.
    """
    for name, digest in identity.items():
        if recorded.get(name) == digest:
            continue
        words = _IDENTITY_WORDS[name]
        if name == "run_digest":
            raise CheckpointError(
                "the run folder belongs to another configuration",
                where=str(where),
                got=f"digest {digest}",
                expected=f"digest {recorded.get(name)}, see the config.yaml of the run",
                remedy="leave run.dir out, so that every configuration has its own, or name another one",
            )
        raise CheckpointError(
            f"the {words} of this run changed since it was last saved",
            where=str(where),
            got=f"digest {digest}",
            expected=f"digest {recorded.get(name)}",
            remedy="put the former files back, or start afresh with another run.dir",
        )
